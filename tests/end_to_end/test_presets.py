"""Every preset on the quickstart's task with fewer digits, ten steps of all: both engines, critic, reference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pipeline.config import Config, load_config
from pipeline.loop.loop import NothingToLearnError
from pipeline.loop.open_loop import open_loop
from pipeline.objectives import PRESETS
from pipeline.rewards.protocol import Verdict
from tests.support.proofs import sampled

QUICKSTART = "configs/quickstart.yaml"
SMALL = ["data.task.min_digits=2", "data.task.max_digits=4", "supervised.steps=60", "supervised.decay_steps=60",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "rollout.max_sampling_rounds=20",
         "train.warmup_steps=0", "train.decay_steps=null", "checks.probe_every=5", "critic.lr=3e-3",
         "train.lr=1e-4"]  # fmt: skip
# The quickstart's rate is for 256 answers a step: at 32 it can unlearn the task, and then no group tells anything.
# The session's trainer holds everything that any preset needs: PPO's critic, and a reference for a KL.
EVERYTHING = "objective={preset: ppo, kl: {estimator: k3, beta: 0.01}}"
GSPO_AS_IN_QUICKSTART = "objective={preset: %s, clip_low: 0.02, clip_high: 0.03}"
OBJECTIVES = {name: f"objective={{preset: {name}}}" for name in PRESETS} | {
    name: GSPO_AS_IN_QUICKSTART % name for name in ("gspo", "gspo_token", "dr_gspo")
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets")
    (folder / "logs").mkdir()
    with open_loop(load_config(QUICKSTART, [*SMALL, EVERYTHING]), folder, folder / "logs") as (loop, _):
        yield loop


def to_reference(rank) -> None:
    """Runs in a trainer rank."""
    rank.trainer.policy.copy_from(rank.trainer.reference)


def under(session, config: Config):
    """The session's engines in a loop of another configuration, policy and optimizer as after the supervised steps."""
    ray.get([rank.__ray_call__.remote(to_reference) for rank in session.trainers.ranks])
    session.trainers.restart_optimizer(config.train)
    loop = replace(session, config=config)
    loop.sync()
    return loop


SAMPLE = ("gspo", "ppo")  # of each kind of ratio, one with a critic


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(PRESETS, SAMPLE))
def test_a_preset_trains_for_ten_steps(session, name):
    loop = under(session, load_config(QUICKSTART, [*SMALL, OBJECTIVES[name]]))
    informative = []
    for number in range(1, 11):
        result = loop.step(number)
        metrics = result.metrics
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["mismatch/max_abs_logprob"] < 1e-4
        assert metrics["routing/replayed_fraction"] == 1.0
        assert metrics["weights/version"] == loop.fleet.version - 1
        informative.append(metrics["reward/uninformative_groups"] < 1)
        assert metrics["train/grad_norm"] > 0 or not informative[-1]
        assert ("probe/k3_native" in metrics) == (number in (1, 6))
        assert ("critic/grad_norm" in metrics) == (name == "ppo")
        if name == "dapo":
            assert metrics["reward/uninformative_groups"] == 0
            assert "rollout/groups_replaced" in metrics
        assert len(result.batch.groups) == 8
    assert sum(informative) >= 8


def everything_earns_one(loop, monkeypatch):
    monkeypatch.setattr(loop.grading, "ask", lambda answers: [Verdict(1.0) for _ in answers])


@pytest.mark.slow
def test_the_critic_learns_what_the_policy_earns(session, monkeypatch):
    """Its error on fresh rollouts falls where every answer earns the same."""
    loop = under(session, load_config(QUICKSTART, [*SMALL, EVERYTHING, "train.lr=1e-9"]))
    everything_earns_one(loop, monkeypatch)
    errors = [loop.step(number).metrics["critic/squared_error"] for number in range(1, 16)]
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.slow
def test_a_yaml_file_that_writes_over_one_cell_of_a_preset_trains(session, tmp_path):
    text = Path(QUICKSTART).read_text()
    start = text.index("objective:\n")
    end = text.index("\nreplay:")
    file = tmp_path / "one_cell.yaml"
    file.write_text(text[:start] + "objective: {preset: grpo, reduction: token_mean}\n" + text[end:])
    loop = under(session, load_config(file, SMALL))
    assert loop.objective.name == "grpo*"
    assert loop.objective.composition.reduction == "token_mean"
    metrics = loop.step(1).metrics
    assert metrics["train/grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_kl_holds_the_policy_at_its_reference(session, place):
    """The reference is the policy at the start, so the first step sees no distance and later ones do."""
    estimator = "k3" if place == "loss" else "k1"
    kl = f"objective={{preset: grpo, kl: {{estimator: {estimator}, beta: 0.1, place: {place}}}}}"
    loop = under(session, load_config(QUICKSTART, [*SMALL, kl, "train.mini_batches=1"]))
    for number in (1, 2, 3):
        metrics = loop.step(number).metrics
        assert abs(metrics["kl/reference"]) < 1e-6 if number == 1 else abs(metrics["kl/reference"]) > 1e-6


@pytest.mark.slow
def test_r2_replays_in_every_update_what_the_proximal_pass_recorded(session):
    loop = under(session, load_config(QUICKSTART, [*SMALL, "replay=r2", "train.mini_batches=4"]))
    metrics = loop.step(1).metrics
    assert metrics["routing/replayed_fraction"] == 1.0
    assert 0.9 < metrics["routing/agreement"] <= 1.0


@pytest.mark.slow
def test_dynamic_sampling_gives_up_with_a_sentence(session, monkeypatch):
    settings = ["objective={preset: dapo}", "rollout.max_sampling_rounds=2"]
    loop = under(session, load_config(QUICKSTART, [*SMALL, *settings]))
    everything_earns_one(loop, monkeypatch)
    with pytest.raises(NothingToLearnError, match=r"in 2 rounds 0 of 16 groups .* objective.dynamic_sampling=false"):
        loop.step(1)
