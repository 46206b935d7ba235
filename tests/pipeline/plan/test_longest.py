"""Plans of long answers: what their sequences take, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config_and_model
from pipeline.plan.layouts import nearest
from pipeline.plan.plan import make_plan

PRESET = Path("configs/qwen3-30b-a3b/4-nodes.yaml").resolve()
LAYERS, TOPK = 48, 8


@pytest.fixture
def planned(tmp_path):
    """Answers of so many tokens of a Qwen3-30B-A3B that reaches as far as its later release does."""
    hf = json.loads((PRESET.parent / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"max_position_embeddings": 262_144}))

    def plan(answer, *overrides):
        file = tmp_path / "long.yaml"
        file.write_text(f"base: {PRESET}\nmodel: {{path: nowhere}}\nrollout: {{max_new_tokens: {answer}}}\n")
        config, model = load_config_and_model(file, list(overrides))
        return make_plan(config, model, "h100")

    return plan


def test_what_a_sequence_of_32k_takes(planned):
    plan = planned(31_744)
    assert plan.fits
    long, rows = plan.longest, 32_768 * LAYERS * TOPK
    assert (long.tokens, long.routes, long.wire) == (32_768, rows, rows * 4 / 3)
    assert long.at_once == plan.server.cache_tokens // 32_768 < plan.server.sequences < long.asked == 256
    assert long.table == 4 * LAYERS * TOPK * plan.server.cache_tokens
    assert plan.memory.routes == 8 * rows
    assert planned(31_744, "parallel.context=2", "parallel.expert=8").memory.routes == 4 * rows
    assert planned(31_744, "replay=none").memory.routes == 0
    assert long.seconds < plan.seconds.rollout


def test_a_sequence_of_128k_is_refused_where_a_rank_has_no_room_and_shared_where_it_has(planned):
    plan = planned(131_072)
    assert [reason[:42] for reason in plan.reasons] == ["a trainer rank of pipeline stage 0 needs 1"]
    shared = planned(131_072, "parallel.context=4", "parallel.expert=8")
    assert shared.fits, shared.reasons
    assert shared.memory.activations == pytest.approx(plan.memory.activations / 4)
    small = planned(131_072, "parallel.context=4", "server.tensor_parallel=1")
    assert any("less than one sequence of 132,096" in reason for reason in small.reasons)


def test_ranks_that_share_a_sequence_are_proposed_where_its_activations_are_what_does_not_fit(planned):
    proposal = nearest(planned(260_000))
    assert proposal is not None
    assert any(word.startswith("parallel.context=") for word in proposal.overrides), proposal.overrides


def test_a_model_that_does_not_reach_so_far_is_refused():
    with pytest.raises(ConfigError, match=r"need a context of 132098 tokens .* and the model's is 40960"):
        load_config_and_model(PRESET, ["rollout.max_new_tokens=131072"])
