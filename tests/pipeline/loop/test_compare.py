"""What a comparison of the engines says, and what it stops."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.engine.fleet import Fleet
from pipeline.loop.compare import DisagreementError, compare, compare_scored, replay_probe, scored_rollouts
from pipeline.loop.loop import Loop
from pipeline.observe.metrics import lag_metrics, mismatch_of
from pipeline.step import Batch, PolicyTokens
from pipeline.types import Prompt
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


STALE = [
    plain_rollout(range(4), -np.arange(1, 5) / 4, weight_versions=np.array([1, 1, 2, 3], np.int32)),
    plain_rollout(range(2), -np.arange(1, 3) / 4, version=3),
]


def test_stale_tokens_are_measured_apart_by_lag_and_are_no_proof_of_a_transfer():
    policy = policy_of(STALE)
    policy.logprobs[0] += np.array([0.5, 0.5, 0.25, 0], np.float32)
    metrics = compare(STALE, policy, version=3, bound=1e-3, staleness=2)
    by_lag = [metrics[f"staleness/abs_logprob_lag_{lag}"] for lag in range(3)]
    assert by_lag == pytest.approx([0, 0.25, 0.5])
    assert metrics["staleness/abs_logprob"] == pytest.approx(1.25 / 6)
    assert "mismatch/abs_logprob" not in metrics


def test_a_token_beyond_the_bound_of_staleness_stops_the_run():
    with pytest.raises(
        DisagreementError, match=r"weights \[1, 2, 3\], the trainer holds 3, and rollout.max_staleness is 1"
    ):
        compare(STALE, policy_of(STALE), version=3, bound=1e-3, staleness=1)
    with pytest.raises(DisagreementError, match=r"the trainer holds 2"):
        compare(STALE, policy_of(STALE), version=2, bound=1e-3, staleness=2)


def scores(gap=0.0):
    """Log-probs of all tokens but the first, as a server gives them."""
    return [(r, np.full(len(r.token_ids) - 1, -0.5 + gap, np.float32), None) for r in STALE]


def test_a_batch_without_a_sampled_token_proves_nothing_at_any_staleness():
    none = dataclasses.replace(
        ROLLOUTS[0],
        trained=np.zeros(4, bool),
        rollout_logprobs=np.zeros(4, np.float32),
        weight_versions=np.full(4, -1, np.int32),
    )
    with pytest.raises(DisagreementError, match=r"sampled under weights \[\], the trainer holds 3"):
        compare([none], policy_of([none]), version=3, bound=1, staleness=2)


def test_what_servers_score_is_compared_as_if_it_had_been_sampled_under_these_weights():
    scored = scored_rollouts(scores(), version=7)
    assert [r.weight_versions.tolist() for r in scored] == [[7] * 4, [7] * 2]
    metrics = compare_scored(scored, policy_of(scored, 1e-4), version=7, bound=1e-3)
    assert metrics["mismatch/abs_logprob"] == pytest.approx(1e-4, rel=1e-2)
    assert metrics["staleness/scored_tokens"] == 6
    with pytest.raises(DisagreementError, match=r"under weights 7 .* the bound is 1e-03"):
        compare_scored(scored, policy_of(scored, 1e-2), version=7, bound=1e-3)


def test_to_compare_nothing_is_an_error():
    with pytest.raises(DisagreementError, match="no token was scored under weights 7"):
        compare_scored([], policy_of([]), version=7, bound=1e-3)


def test_shares_of_lags_are_of_sampled_tokens():
    holes = plain_rollout(
        range(3),
        np.array([-1, 0, -1]),
        trained=HOLES,
        weight_versions=np.where(HOLES, 3, -1).astype(np.int32),
    )
    groups = (graded_group(Prompt(np.zeros(1, np.int32), ""), [*STALE, holes], [1.0, 0.0, 1.0]),)
    metrics = lag_metrics(Batch(1, 3, groups))
    assert [metrics[f"rollout/lag_{lag}"] for lag in range(3)] == pytest.approx([5 / 8, 1 / 8, 2 / 8])
    assert (metrics["rollout/lag_mean"], metrics["rollout/lag_max"]) == (5 / 8, 2)
    assert metrics["rollout/spanning_versions"] == pytest.approx(1 / 3)


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
