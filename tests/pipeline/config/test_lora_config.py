"""What of a configuration with adapters is refused, in one sentence."""

from __future__ import annotations

import pytest

from pipeline.checkpoints.resume import differences
from pipeline.config import ConfigError, load_config

QUICKSTART = "configs/quickstart.yaml"
NAMES = "all, attention, experts, down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora={rank: 0}"], "lora.rank: Input should be greater than or equal to 1"),
        (["lora.alpha=0"], "lora.alpha: Input should be greater than 0"),
        (["lora={targets: []}"], "lora.targets: a list of no projections trains nothing; name some, or write all"),
        (["lora={targets: experts}"], "lora.targets: write all, or a list, also of one: [experts]"),
        (["lora={targets: [q_proj, lm_head]}"], f"lora.targets: qwen3_moe has no lm_head; there are {NAMES}"),
        (["lora={targets: [shared_experts]}"], f"lora.targets: qwen3_moe has no shared_experts; there are {NAMES}"),
        (["lora={dropout: 0.1}"], "lora.dropout: there is no such key; there are alpha, rank, router, targets"),
        (
            ["lora={rank: 4}", "trainer.extra={moe_shared_expert_overlap: true}"],
            "lora: overlapped shared experts gather their tokens outside their layers; leave moe_shared_expert_overlap "
            "out of trainer.extra, or leave lora out",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_sentence(overrides, said):
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, overrides)
    assert str(error.value) == said


def test_adapters_are_part_of_what_a_run_computes():
    one, other = (
        load_config(QUICKSTART, o).model_dump(mode="json") for o in ([], ["lora={rank: 4, targets: [experts]}"])
    )
    said = differences(one, other)
    assert "lora.rank=4 (was None)" in said
