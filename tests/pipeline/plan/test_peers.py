"""Steps that others have published for H100, and what a plan says of them; docs/plan.md has the table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.config import load_config_and_model
from pipeline.plan.plan import Plan, expected_lengths, make_plan

GRPO = "kl: {estimator: k3, beta: 0.01}"
SHARED = [
    "data.max_prompt_tokens=256", "replay=none", "trainer.offload_optimizer=false", "trainer.recompute=full",
    f"objective={{preset: grpo, {GRPO}}}",
]  # fmt: skip
ONE_OFF = [
    "rollout.max_staleness=1", "train.mini_batches=1",
    f"objective={{preset: grpo, {GRPO}, correction: {{kind: token_tis}}}}",
]  # fmt: skip
SPLIT = "first_stage_layers: 11, last_stage_layers: 11, expert: 16, expert_tensor: 1"


@dataclass(frozen=True)
class Published:
    """NeMo-RL, GRPO on OpenMathInstruct-2, bfloat16, DGX H100.

    tokens_s: of a GPU. longest: of prompt and answer. mean: of these. prompts: of a step. overrides: the layout.
    Synchronously trainer and servers take turns on the same GPUs: a plan with as many GPUs again for the servers has
    the same phases, one after another.
    """

    preset: str
    gpus: int
    tokens_s: float
    longest: int
    mean: float
    prompts: int
    overrides: tuple[str, ...]


STEPS = {
    "Qwen3-30B-A3B, on policy": Published(
        "qwen3-30b-a3b/4-nodes", 32, 1102, 4096, 3306, 64,
        ("cluster.nodes=8", "parallel.ranks=32", "server.replicas=16"),
    ),
    "Qwen3-30B-A3B, one step off": Published(
        "qwen3-30b-a3b/4-nodes", 32, 1414, 4096, 3306, 64,
        ("cluster.nodes=4", "parallel={ranks: 16, pipeline: 2, expert: 8}", *ONE_OFF),
    ),
    "Qwen3-235B-A22B, one step off": Published(
        "qwen3-235b-a22b/8-nodes", 256, 52.2, 8192, 5691, 16,
        ("cluster.nodes=32", f"parallel={{ranks: 128, tensor: 4, sequence: true, pipeline: 8, {SPLIT}}}",
         "server.replicas=16", *ONE_OFF),
    ),
}  # fmt: skip


def planned(step: Published) -> Plan:
    """With answers of the published mean, cut where they were."""
    prompt = 128
    sizes = [
        f"rollout.prompts_per_step={step.prompts}", "rollout.samples_per_prompt=32",
        f"rollout.max_new_tokens={step.longest - 2 * prompt}", f"trainer.micro_batch_tokens={step.longest}",
    ]  # fmt: skip
    config, model = load_config_and_model(f"configs/{step.preset}.yaml", [*SHARED, *sizes, *step.overrides])
    low, high = 100.0, 1e6
    for _ in range(40):  # the mean before the cut
        mean = (low * high) ** 0.5
        cut = expected_lengths(config, mean).sample(step.prompts * 32, 0).mean()
        low, high = (mean, high) if cut < step.mean - prompt else (low, mean)
    return make_plan(config, model, "h100", mean_response=low)


@pytest.mark.parametrize("name", STEPS)
def test_a_plan_is_within_a_quarter_of_what_was_published(name):
    step = STEPS[name]
    plan = planned(step)
    assert plan.fits, plan.reasons
    assert plan.work.tokens / plan.seconds.step / step.gpus == pytest.approx(step.tokens_s, rel=0.25)
