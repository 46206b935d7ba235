"""Which passes an update makes, what each mini-batch trains on, and what of it is said; the trainers are made up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import load_config
from pipeline.config.replay import Replay
from pipeline.loop.compare import DisagreementError
from pipeline.loop.update import (
    Measured,
    NotFiniteError,
    Update,
    loss_rows,
    mini_batches,
    teaches,
    turns_of,
)
from pipeline.objectives import PRESETS, ObjectiveConfig, resolve
from pipeline.observe.metrics import Timer
from pipeline.step import Batch, PolicyTokens
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.trainer.losses import ON_POLICY
from pipeline.trainer.spikes import GradientSpikes
from pipeline.types import Episode, Group, Prompt
from tests.support.episodes import graded_group, plain_rollout
from tests.support.fake_trainers import FakeTrainers

QUICKSTART = "configs/quickstart.yaml"
KL = "objective={preset: grpo, kl: {estimator: k1, beta: 0.1, place: reward}}"
MODEL = SimpleNamespace(num_layers=4, num_experts=8)
LENGTHS = ((3, 1), (2, 4), (1, 1), (5, 2))


def make_batch(version=7, groups_of=LENGTHS) -> Batch:
    groups = []
    for index, lengths in enumerate(groups_of):
        rollouts = [plain_rollout(range(n), -np.arange(1, n + 1) / 4, version=7) for n in lengths]
        groups.append(graded_group(Prompt(np.zeros(1, np.int32), "", index=index), rollouts, [1.0, 0.0]))
    return Batch(3, version, tuple(groups))


def run(*overrides, replay=Replay.R3, batch=None, **fake):
    batch = batch or make_batch()
    config = load_config(QUICKSTART, list(overrides))
    trainers = FakeTrainers(batch.rollouts, **fake)
    update = Update(config, resolve(config.objective), trainers, MODEL, replay, GradientSpikes(config.train))
    return trainers, update(batch, Timer())


def test_one_mini_batch_is_trained_on_policy_and_its_own_forward_pass_is_the_proximal_one():
    trainers, result = run("train.mini_batches=1")
    assert trainers.calls == ["update_policy"]
    ((denominators, rows),) = trainers.updates
    assert all(row.proximal_logprobs is ON_POLICY for row in rows.values())
    assert (denominators.sequences, denominators.tokens) == (8, 19)
    assert result.metrics["mismatch/max_abs_logprob"] == 0
    for a, b in zip(result.proximal.logprobs, result.current_logprobs, strict=True):
        assert np.array_equal(a, b)


def test_several_mini_batches_are_whole_groups_against_one_proximal_pass():
    trainers, result = run("train.mini_batches=2")
    assert trainers.calls == ["logprobs None", "update_policy", "update_policy"]
    (_, first), (_, second) = trainers.updates
    assert (sorted(first), sorted(second)) == ([0, 1, 4, 5], [2, 3, 6, 7])
    for rows in (first, second):
        for i, row in rows.items():
            assert np.array_equal(row.proximal_logprobs, result.proximal.logprobs[i])
    moved = [float((c - p).mean()) for c, p in zip(result.current_logprobs, result.proximal.logprobs, strict=True)]
    assert moved == pytest.approx([0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5])
    assert result.metrics["loss/policy"] == 4.0


def with_a_hole(n: int):
    """A rollout of n sampled tokens, and one between the first two that was not."""
    trained = np.arange(n + 1) != 1
    versions = np.where(trained, 7, -1).astype(np.int32)
    return plain_rollout(range(n + 1), np.where(trained, -1, 0), trained=trained, weight_versions=versions)


def batch_with_holes() -> Batch:
    prompts = [Prompt(np.zeros(1, np.int32), "", index=index) for index in range(2)]
    groups = (graded_group(p, [with_a_hole(3), with_a_hole(2)], [1.0, 0.0]) for p in prompts)
    return Batch(3, 7, tuple(groups))


def test_denominators_count_sampled_tokens_and_the_prompts_of_their_mini_batch():
    trainers, _ = run("train.mini_batches=1", "rollout.max_new_tokens=11", batch=batch_with_holes())
    ((denominators, _),) = trainers.updates
    assert (denominators.sequences, denominators.tokens, denominators.prompts) == (4, 10, 2)
    assert denominators.max_length == 11
    trainers, _ = run("train.mini_batches=2", batch=batch_with_holes())
    assert [(d.sequences, d.tokens, d.prompts) for d, _ in trainers.updates] == [(2, 5, 1)] * 2


def test_a_metric_of_several_mini_batches_is_their_mean():
    _, result = run("train.mini_batches=2", batch=make_batch(groups_of=LENGTHS[:3]))
    assert result.metrics["loss/policy"] == (4 + 2) / 2


def test_rollouts_of_older_weights_are_trained_on_as_far_as_the_bound_allows():
    stale = "rollout.max_staleness=1", "objective={preset: grpo, correction: {kind: token_tis}}"
    _, result = run("train.mini_batches=2", *stale, batch=make_batch(version=8))
    assert result.metrics["staleness/max_abs_logprob"] == 0
    with pytest.raises(DisagreementError, match=r"rollout\.max_staleness is 1"):
        run("train.mini_batches=2", *stale, batch=make_batch(version=9))


def test_r2_records_the_routes_of_the_proximal_pass_and_r3_does_not():
    assert run("train.mini_batches=1", replay=Replay.R2)[0].calls == ["record_routes 4 8", "update_policy"]
    assert run("train.mini_batches=1", replay=Replay.NONE)[0].calls == ["update_policy"]


def test_routing_is_of_the_proximal_pass_under_r3_and_of_the_updates_otherwise():
    assert run("train.mini_batches=2")[1].proximal.routing.tolist() == [[10, 9, 0, 0]]
    assert run("train.mini_batches=2", replay=Replay.R2)[1].proximal.routing.tolist() == [[20, 18, 0, 0]]


def test_a_reference_and_a_critic_are_asked_where_the_objective_has_them():
    trainers, result = run("train.mini_batches=1", KL)
    assert trainers.calls == ["logprobs None", "reference_logprobs", "update_policy"]
    assert result.metrics["kl/reference"] == pytest.approx(1.0)
    trainers, result = run("train.mini_batches=1", "objective={preset: ppo}")
    assert trainers.calls[-2:] == ["update_policy", "update_critic"]
    assert "values" in trainers.calls
    assert result.metrics["critic/grad_norm"] == 2.0
    ((_, rows),) = trainers.updates
    assert all(row.proximal_values.tolist() == [0] * len(row.rollout_logprobs) for row in rows.values())
    assert all(row.returns is not None for row in rows.values())


def scored(batch: Batch) -> Batch:
    """A teacher that thinks each token half as likely as mu did, and names one."""

    def of(rollout):
        told = TeacherScores(
            rollout.rollout_logprobs - np.float32(0.5), np.zeros((len(rollout), 1), np.int32),
            np.full((len(rollout), 1), -3, np.float32),
        )  # fmt: skip
        return replace(rollout, teacher=told)

    groups = [
        replace(g, episodes=tuple(replace(e, rollouts=tuple(map(of, e.rollouts))) for e in g.episodes))
        for g in batch.groups
    ]
    return replace(batch, groups=tuple(groups))


def teacher(engine="server", **cells):
    return f"teacher={{path: /x, engine: {engine}}}", f"objective={{preset: dr_grpo, distillation: {cells}}}"


def test_a_teachers_advantage_is_of_pi_o_and_stands_beside_that_of_the_rewards():
    trainers, result = run("train.mini_batches=1", *teacher(reward=0.5, coefficient=2), batch=scored(make_batch()))
    assert trainers.calls == ["logprobs None", "update_policy"]
    assert result.metrics["teacher/kl"] == pytest.approx(0.5)
    ((_, rows),) = trainers.updates
    for i, row in rows.items():
        assert row.teacher is None, "the loss reads none"
        assert row.advantage == pytest.approx(np.full(len(row.rollout_logprobs), 0.25 - 0.5 * (i % 2) - 1.0))


def test_a_teachers_term_reads_its_scores_and_asks_for_no_pass():
    batch = scored(make_batch())
    trainers, _ = run("train.mini_batches=1", *teacher(place="loss", top_k=1), batch=batch)
    assert trainers.calls == ["update_policy"]
    ((_, rows),) = trainers.updates
    assert all(row.teacher is batch.rollouts[i].teacher for i, row in rows.items())
    assert all(isinstance(row.advantage, float) for row in rows.values())


def test_a_teacher_beside_the_policy_is_asked_in_the_step_and_one_that_said_nothing_is_missed():
    trainers, result = run("train.mini_batches=1", *teacher("trainer"))
    assert trainers.calls == ["logprobs None", "teacher_logprobs", "update_policy"]
    assert result.metrics["teacher/kl"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="scored 0 of 8 rollouts"):
        run(*teacher())


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("values", ["objective={preset: ppo}"], "values of the critic"),
        ("reference_logprobs", [KL], "log-probs of the reference"),
        ("teacher_logprobs", teacher("trainer"), "log-probs of the teacher"),
    ],
)
@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_a_model_beside_the_policy_that_says_no_number_is_named_before_anything_is_trained(
    monkeypatch, method, settings, named, number
):
    asked = []

    def broken(trainers):
        rows = [np.zeros(len(rollout), np.float32) for rollout in trainers.rollouts]
        rows[1][-1] = rows[6][-1] = number
        asked.append(trainers)
        return rows

    monkeypatch.setattr(FakeTrainers, method, broken)
    with pytest.raises(NotFiniteError, match=f"^{named} are not finite, in 2 of 8 rollouts; nothing is trained on"):
        run(*settings)
    (trainers,) = asked
    assert "update_policy" not in trainers.calls


def test_a_second_moment_asks_for_the_proximal_pass_and_counts_what_it_drops():
    class Apart(FakeTrainers):
        def logprobs(self, *args):
            found = super().logprobs(*args)
            found.logprobs[0][0] -= 1.5
            return found

    batch = make_batch()
    config = load_config(QUICKSTART, ["train.mini_batches=1", "objective={preset: m2po}", "checks.max_abs_logprob=9"])
    trainers = Apart(batch.rollouts)
    result = Update(config, resolve(config.objective), trainers, MODEL, Replay.NONE, GradientSpikes(config.train))(
        batch, Timer()
    )
    assert trainers.calls == ["logprobs None", "update_policy"]
    assert result.metrics["correction/second_moment_cut"] == pytest.approx(1 / 19)
    ((_, rows),) = trainers.updates
    assert rows[0].advantage[0] == 0
    assert all((row.advantage[i == 0 :] != 0).all() for i, row in rows.items())


def test_the_reference_is_compared_on_sampled_tokens():
    class Reference(FakeTrainers):
        def reference_logprobs(self):
            found = super().reference_logprobs()
            for row, rollout in zip(found, self.rollouts, strict=True):
                row[~rollout.trained] = -50
            return found

    batch = batch_with_holes()
    config = load_config(QUICKSTART, ["train.mini_batches=1", KL])
    trainers, spikes = Reference(batch.rollouts), GradientSpikes(config.train)
    result = Update(config, resolve(config.objective), trainers, MODEL, Replay.NONE, spikes)(batch, Timer())
    assert result.metrics["kl/reference"] == pytest.approx(1.0)


def test_engines_that_disagree_stop_the_update_before_it_where_there_is_a_pass_before_it():
    with pytest.raises(DisagreementError, match=r"differ by 5\.00e-01 nats"):
        run("train.mini_batches=2", gap=0.5)
    batch = make_batch(version=8)
    with pytest.raises(DisagreementError, match=r"sampled under weights \[7\], the trainer holds 8"):
        run("train.mini_batches=1", batch=batch)


def test_mini_batches_deal_whole_groups_in_turn():
    assert mini_batches(make_batch(), 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def rows_of(objective: str, batch: Batch, values=None):
    measured = Measured(
        PolicyTokens([r.rollout_logprobs for r in batch.rollouts], [], np.zeros((0, 4), np.int64)),
        values=values,
    )
    return loss_rows(resolve(ObjectiveConfig(preset=objective)), batch, measured, max_new_tokens=16)


def cut(rollout, at: int, version=7):
    """One conversation as two rollouts: the second begins with the first's tokens as its prompt."""
    ids, logprobs = rollout.response_ids, rollout.rollout_logprobs
    head = plain_rollout(ids[:at], logprobs[:at], version)
    tail = plain_rollout(
        ids[at:], logprobs[at:], version, prompt_ids=np.concatenate([rollout.prompt_ids, ids[:at]]).astype(np.int32)
    )
    return head, tail


@pytest.mark.parametrize("objective", ["grpo", "rloo", "reinforce_plus_plus", "ppo"])
def test_an_episode_cut_into_rollouts_has_the_advantages_of_the_whole(objective):
    """Baselines are over episodes: three rollouts of two episodes are not three samples."""
    whole, other = plain_rollout(range(5), -np.ones(5), 7), plain_rollout(range(3), -np.ones(3), 7)
    values = [np.linspace(0, 1, 5, dtype=np.float32), np.zeros(3, np.float32)] if objective == "ppo" else None
    prompt = Prompt(np.zeros(1, np.int32), "")
    one = Batch(1, 7, (graded_group(prompt, [whole, other], [1.0, 0.0]),))
    two = Batch(1, 7, (Group(prompt, (Episode(cut(whole, 2), 1.0), Episode((other,), 0.0))),))
    pieces = None if values is None else [values[0][:2], values[0][2:], values[1]]
    measured = []
    for batch, critic in ((one, values), (two, pieces)):
        logprobs = [r.rollout_logprobs for r in batch.rollouts]
        measured.append(Measured(PolicyTokens(logprobs, [], np.zeros((0, 4), np.int64)), logprobs, critic))
    preset = resolve(ObjectiveConfig(preset=objective))
    expected, found = (loss_rows(preset, b, m, max_new_tokens=16) for b, m in zip((one, two), measured, strict=True))
    assert len(found) == 3

    def by_token(rows, lengths):
        return np.concatenate([np.broadcast_to(r.advantage, n) for r, n in zip(rows, lengths, strict=True)])

    assert by_token(found, (2, 3, 3)) == pytest.approx(by_token(expected, (5, 3)), abs=1e-6)
    if objective == "ppo":
        assert np.concatenate([r.returns for r in found[:2]]) == pytest.approx(expected[0].returns, abs=1e-6)


def test_a_failed_episode_is_in_no_baseline_and_in_no_mini_batch():
    a, b, c = (plain_rollout(range(n), -np.ones(n), 7) for n in (1, 2, 3))
    prompt = Prompt(np.zeros(1, np.int32), "")
    group = Group(prompt, (Episode((a,), 1.0), Episode((b,), failure="the verifier hung"), Episode((c,), 0.0)))
    batch = Batch(1, 7, (group,))
    assert mini_batches(batch, 1) == [[0, 1]]
    found = [row.advantage for row in rows_of("dr_grpo", batch)]
    assert found == [row.advantage for row in rows_of("dr_grpo", Batch(1, 7, (graded_group(prompt, [a, c], [1, 0]),)))]
    assert found == [0.5, -0.5]


def test_the_overlong_penalty_counts_what_the_policy_sampled():
    trained = np.array([True, False, False, True])
    long = plain_rollout(
        range(4), np.where(trained, -1, 0), trained=trained, weight_versions=np.where(trained, 7, -1).astype(np.int32)
    )
    short = plain_rollout(range(2), -np.ones(2), 7)
    prompt = Prompt(np.zeros(1, np.int32), "")
    objective = resolve(ObjectiveConfig(preset="dr_grpo", overlong_fraction=1.0))
    rewards = {}
    for name, rollout in (("with holes", long), ("compact", short)):
        batch = Batch(1, 7, (graded_group(prompt, [rollout, plain_rollout([1], -np.ones(1), 7)], [1.0, 0.0]),))
        rewards[name] = [r.advantage for r in loss_rows(objective, batch, Measured(None), max_new_tokens=4)]
    assert rewards["with holes"] == rewards["compact"]


def test_of_two_right_answers_the_longer_one_is_worth_less_under_the_overlong_penalty():
    objective = resolve(ObjectiveConfig(preset="dr_grpo", overlong_fraction=1.0))
    pair = [plain_rollout(range(n), -np.ones(n), 7) for n in (4, 1)]
    batch = Batch(1, 7, (graded_group(Prompt(np.zeros(1, np.int32), ""), pair, [1.0, 1.0]),))
    long, short = (row.advantage for row in loss_rows(objective, batch, Measured(None), max_new_tokens=4))
    assert long < 0 < short


def test_a_row_knows_how_many_tokens_were_sampled_for_its_prompt():
    objective = next(o for name in PRESETS if (o := resolve(ObjectiveConfig(preset=name))).needs_prompt_tokens)
    batch = batch_with_holes()
    found = loss_rows(objective, batch, Measured(None), max_new_tokens=4)
    assert [row.prompt_tokens for row in found] == [5] * 4


def two_turns(first: int, second: int, *rewards: float, split=False) -> Episode:
    """A conversation of two turns of so many tokens, with a token of a tool between them, or as two rollouts."""
    if split:
        pair = plain_rollout(range(first), -np.ones(first), 7), plain_rollout(range(second), -np.ones(second), 7)
        return Episode(pair, sum(rewards), turn_rewards=rewards)
    trained = np.arange(first + 1 + second) != first
    versions = np.where(trained, 7, -1).astype(np.int32)
    rollout = plain_rollout(range(len(trained)), np.where(trained, -1, 0), trained=trained, weight_versions=versions)
    return Episode((rollout,), sum(rewards), turn_rewards=rewards)


def conversations(*episodes: Episode) -> Batch:
    return Batch(1, 7, (Group(Prompt(np.zeros(1, np.int32), ""), episodes),))


BY_TURN = resolve(ObjectiveConfig(preset="dr_grpo", credit="turn"))


def test_tokens_of_a_turn_have_what_it_and_those_after_it_earned():
    batch = conversations(two_turns(2, 1, 1.0, 0.5), two_turns(1, 2, 0.0, -0.5))
    first, second = (row.advantage.tolist() for row in loss_rows(BY_TURN, batch, Measured(None), max_new_tokens=9))
    assert first == [1.0, 1.0, 0.0, 0.5]
    assert second == [-1.0, 0.0, -0.5, -0.5]


def test_turns_of_several_rollouts_are_counted_on():
    whole = conversations(two_turns(2, 1, 1.0, 0.5), two_turns(1, 2, 0.0, -0.5))
    parts = conversations(two_turns(2, 1, 1.0, 0.5, split=True), two_turns(1, 2, 0.0, -0.5))
    expected, found = (loss_rows(BY_TURN, b, Measured(None), max_new_tokens=9) for b in (whole, parts))
    assert [row.advantage.tolist() for row in found] == [[1.0, 1.0], [0.5], [-1.0, 0.0, -0.5, -0.5]]
    assert found[2].advantage.tolist() == expected[1].advantage.tolist()


def test_a_conversation_without_rewards_of_turns_has_all_of_it_on_the_last():
    episodes = replace(two_turns(2, 1, 0.25, 0.5), turn_rewards=None), two_turns(1, 2, 0.0, -0.5)
    turns = turns_of(episodes, torch.zeros(2))
    assert turns.rewards.tolist() == [[0.0, 0.75], [0.0, -0.5]]
    assert turns.numbers.tolist() == [[0, 0, -1, 1], [0, -1, 1, 1]]


def test_the_overlong_penalty_is_the_last_turns():
    objective = resolve(ObjectiveConfig(preset="dr_grpo", credit="turn", overlong_fraction=1.0))
    long = conversations(two_turns(1, 3, 0.0, 0.0), two_turns(1, 1, 0.0, 0.0))
    first, second = (row.advantage.tolist() for row in loss_rows(objective, long, Measured(None), max_new_tokens=4))
    assert first == [-0.25, 0.0, -0.25, -0.25, -0.25]
    assert second == [0.25, 0.0, 0.25]


def test_equal_rewards_teach_where_turns_differ_and_the_objective_reads_them():
    (group,) = conversations(two_turns(1, 1, 1.0, 0.0), two_turns(1, 1, 0.0, 1.0)).groups
    assert teaches(BY_TURN, group)
    assert not teaches(resolve(ObjectiveConfig(preset="dr_grpo")), group)
    assert not teaches(BY_TURN, conversations(two_turns(1, 1, 1.0, 0.0), two_turns(1, 2, 1.0, 0.0)).groups[0])
