"""What a comparison of the engines says, and what it stops."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.engine.fleet import Fleet
from pipeline.loop.compare import DisagreementError, compare, replay_probe
from pipeline.loop.loop import Loop
from pipeline.observe.metrics import mismatch_of
from pipeline.types import Batch, PolicyTokens, Prompt
from tests.support.episodes import graded_group, plain_rollout
from tests.support.fake_trainers import FakeTrainers

ROLLOUTS = [plain_rollout(range(n), -np.arange(1, n + 1) / 4, version=3) for n in (4, 2)]
HOLES = np.array([True, False, True])


def policy_of(rollouts, gap=0.0) -> PolicyTokens:
    return FakeTrainers(rollouts, gap).logprobs()


def test_the_gap_is_over_sampled_tokens_only():
    versions = np.where(HOLES, 3, -1).astype(np.int32)
    rollout = plain_rollout(range(3), np.array([-1, 0, -1]), trained=HOLES, weight_versions=versions)
    policy = policy_of([rollout])
    policy.logprobs[0][1] = -50
    policy.entropy[0][1] = 99
    assert mismatch_of([rollout], policy)["mismatch/max_abs_logprob"] == 0
    assert compare([rollout], policy, version=3, bound=1e-3)["policy/entropy"] == 0.5


def test_tokens_over_old_keys_and_values_are_in_no_bound_and_have_numbers_of_their_own():
    rollout = dataclasses.replace(ROLLOUTS[0], mixed_kv=np.array([False, False, True, True]))
    policy = policy_of([rollout, ROLLOUTS[1]])
    policy.logprobs[0][2:] -= np.array([1, 3], np.float32)
    metrics = compare([rollout, ROLLOUTS[1]], policy, version=3, bound=1e-3)
    assert metrics["mismatch/max_abs_logprob"] == 0
    assert metrics["mixed_kv/fraction"] == pytest.approx(2 / 6)
    assert metrics["mixed_kv/abs_logprob"] == pytest.approx(2)
    assert metrics["mixed_kv/max_abs_logprob"] == pytest.approx(3)
    assert not any(name.startswith("mixed_kv") for name in compare(ROLLOUTS, policy_of(ROLLOUTS), version=3, bound=1))


def test_engines_within_the_bound_are_measured_and_beyond_it_stopped():
    metrics = compare(ROLLOUTS, policy_of(ROLLOUTS, 1e-4), version=3, bound=1e-3)
    assert metrics["mismatch/abs_logprob"] == pytest.approx(1e-4, rel=1e-2)
    with pytest.raises(DisagreementError, match=r"under weights 3 .* differ by 1\.00e-02 nats .* the bound is 1e-03"):
        compare(ROLLOUTS, policy_of(ROLLOUTS, 1e-2), version=3, bound=1e-3)
    with pytest.raises(DisagreementError, match="differ by nan"):
        compare(ROLLOUTS, policy_of(ROLLOUTS, np.nan), version=3, bound=1e-3)


def test_another_version_is_named():
    with pytest.raises(DisagreementError, match=r"sampled under weights \[3\], the trainer holds 4"):
        compare(ROLLOUTS, policy_of(ROLLOUTS), version=4, bound=1e-3)


def test_the_replay_probe_measures_both_kinds_of_routing_on_the_first_rollouts():
    trainers = FakeTrainers(ROLLOUTS, gap=0.5)
    metrics = replay_probe(trainers, ROLLOUTS[:1])
    assert trainers.calls == ["logprobs replay", "logprobs native"]
    assert metrics["probe/abs_logprob_replay"] == pytest.approx(0.5)
    assert metrics["probe/abs_logprob_native"] == pytest.approx(0.75)


def make_loop(*overrides, gap=0.0, experts=8) -> Loop:
    """A loop that trains on ROLLOUTS without engines."""
    source = SimpleNamespace(stop_token_ids=(1,))
    model = SimpleNamespace(num_experts=experts, num_layers=4)
    return Loop(
        load_config("configs/quickstart.yaml", list(overrides)), model, source, Fleet(), FakeTrainers(ROLLOUTS, gap)
    )


def batch_of(step: int) -> Batch:
    return Batch(step, 3, (graded_group(Prompt(np.zeros(1, np.int32), ""), ROLLOUTS, [1.0, 0.0]),))


def test_routing_is_probed_at_the_steps_that_the_checks_name_and_only_under_r3():
    probed = [bool(make_loop("checks.probe_every=3").probe_replay(batch_of(step))) for step in range(1, 8)]
    assert probed == [True, False, False, True, False, False, True]
    assert make_loop("checks.probe_every=0").probe_replay(batch_of(1)) == {}
    assert make_loop("replay=r2", "checks.probe_every=1").probe_replay(batch_of(1)) == {}
    assert make_loop("checks.probe_every=1", experts=0).probe_replay(batch_of(1)) == {}


@pytest.mark.parametrize(("replay", "routes"), [("r3", True), ("r2", False), ("none", False)])
def test_routes_travel_to_the_trainer_where_it_is_to_take_them(replay, routes):
    loop = make_loop(f"replay={replay}")
    with_routes = plain_rollout([1], -np.ones(1), routes=np.array([[[0, 1]] * 4], np.uint8))
    loop.load([with_routes])
    (sample,) = loop.trainers.loaded
    assert (sample.routes is not None) == routes
    assert sample.trained.tolist() == [True]
