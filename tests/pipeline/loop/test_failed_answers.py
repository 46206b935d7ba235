"""Answers that a verifier failed on, through a whole step: what is trained on, counted, dumped and shown.

The verifier runs in real processes; server and trainer are made up here.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from pipeline.config import load_config
from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.dumps.dump import dump_path, read_dump
from pipeline.engine.fleet import Fleet
from pipeline.loop.compare import DisagreementError
from pipeline.loop.loop import Loop, NothingToLearnError
from pipeline.loop.update import mini_batches
from pipeline.observe.metrics import Timer, batch_metrics
from pipeline.observe.rollout_text import pick, rollout_text
from pipeline.observe.step_record import shown_rollouts, step_record
from pipeline.rewards import Grader, RewardError
from pipeline.rollout.grading import OwnGrading
from pipeline.step import Batch
from pipeline.trainer.waits import TrainerError
from pipeline.types import Group, Prompt
from tests.support.episodes import plain_rollout
from tests.support.fake_trainers import FakeTrainers

FAILS, EXITS = "x", "!"  # see tests.support.hostile.number


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_character_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grader():
    with Grader("tests.support.hostile:number", workers=2) as made:
        yield made


@pytest.fixture
def make_loop(tokenizer, grader, monkeypatch, tmp_path):
    """A loop that samples these answers, a tuple a prompt, in order."""

    def make(answers, *overrides):
        left = iter(enumerate(answers))

        def sample(client, prompts, n, sampling, attempts, teacher):
            def group(prompt, texts):
                ids = [tokenizer.encode(f"{text}<|eos|>", add_special_tokens=False) for text in texts]
                return Group.of_single_turns(prompt, [plain_rollout(i, -np.arange(1, len(i) + 1) / 4) for i in ids])

            return [group(prompt, answers[prompt.index]) for prompt in prompts]

        monkeypatch.setattr("pipeline.loop.loop.sample_groups_sync", sample)
        source = SimpleNamespace(
            stop_token_ids=(1,),
            tokenizer=tokenizer,
            take=lambda n: [Prompt(np.zeros(1, np.int32), "q", {"answer": "1"}, next(left)[0]) for _ in range(n)],
            learned=lambda prompt, rewards: loop.learned.append((prompt.index, rewards.tolist())),
            metrics=lambda: {"data/q/seen": 4.0},
        )
        config = load_config("configs/quickstart.yaml", ["rollout.prompts_per_step=4", *overrides])
        trainers = FakeTrainers([])
        model = SimpleNamespace(num_experts=8, num_layers=4)
        loop = Loop(
            config, model, source, Fleet(), trainers, dumps=tmp_path / "dumps", grading=OwnGrading(grader, tokenizer)
        )
        loop.load = lambda rollouts: setattr(trainers, "rollouts", list(rollouts))
        loop.said, loop.learned = [], []
        loop.say = loop.said.append
        return loop

    return make


def rewards_of(groups):
    return [[episode.reward for episode in group.episodes] for group in groups]


MIXED = [("1", "0", FAILS), ("1", FAILS, EXITS), (FAILS, FAILS, FAILS), ("0", "1", "1")]


def test_a_step_trains_on_what_could_be_graded_and_says_the_rest(make_loop, tokenizer):
    loop = make_loop(MIXED, "train.mini_batches=2", "debug.dump_rollouts=true", "objective={preset: dr_grpo}")
    result = loop.step(1)
    assert rewards_of(result.batch.groups) == [[1, 0, None], [None] * 3, [None] * 3, [0, 1, 1]]

    updates = loop.trainers.updates
    assert [sorted(rows) for _, rows in updates] == [[0, 1], [2, 3, 4]]  # whole groups, those that are left
    assert [(d.sequences, d.tokens) for d, _ in updates] == [(2, 4), (3, 6)]
    advantages = [row.advantage for _, rows in updates for _, row in sorted(rows.items())]
    assert advantages == pytest.approx([0.5, -0.5, -2 / 3, 1 / 3, 1 / 3])

    metrics = result.metrics
    assert (metrics["reward/failed"], metrics["reward/groups_dropped"]) == (6, 2)
    assert (metrics["reward/failures_raised"], metrics["reward/failures_exited"]) == (5, 1)
    assert metrics["reward/failures_timeout"] == 0
    assert metrics["reward/mean"] == pytest.approx(3 / 5)
    assert metrics["reward/uninformative_groups"] == 0
    assert metrics["response/length_mean"] == 2
    assert [name for name, value in metrics.items() if not np.isfinite(value)] == []
    assert metrics["data/q/seen"] == 4
    (said,) = loop.said
    assert said.startswith("step 1: 6 of 12 answers could not be graded (5 raised, 1 exited); first: the verifier")

    read = read_dump(dump_path(loop.dumps, 1)).batch
    assert rewards_of(read.groups) == rewards_of(result.batch.groups)
    assert [e.failure for g in read.groups for e in g.episodes] == [
        e.failure for g in result.batch.groups for e in g.episodes
    ]
    assert mini_batches(read, 2) == mini_batches(result.batch, 2)

    text = rollout_text(result.batch.groups[1], 2, tokenizer)
    assert "ended its process with code 0, on prompt 1 ('q'), response '!'" in text
    step_record(result, loop.objective)
    assert [row["reward"] for row in shown_rollouts(result, tokenizer, 9)] == [1, 0, 1, 0, 1]


def test_fewer_groups_than_mini_batches_make_fewer_updates(make_loop):
    loop = make_loop(MIXED, "train.mini_batches=4")
    assert [sorted(rows) for _, rows in (loop.step(1), loop.trainers.updates)[1]] == [[0, 1], [2, 3, 4]]


def test_a_step_of_which_nothing_is_left_ends_the_run_with_a_sentence(make_loop):
    for answers in ([(FAILS, FAILS)] * 4, [("1", FAILS)] * 4):
        with pytest.raises(RewardError, match=r"step 3: nothing is left to train on; .*first: the verifier .*ValueErr"):
            make_loop(answers).step(3)
    alone = make_loop([("1", FAILS)] * 4, "objective={preset: reinforce_plus_plus}")
    assert not alone.objective.needs_group
    assert rewards_of(alone.step(3).batch.groups) == [[1, None]] * 4


def test_dynamic_sampling_replaces_what_has_failures_and_teaches_nothing(make_loop):
    dapo = "objective={preset: dapo}"
    answers = [("1", FAILS, "0"), ("1", "1", FAILS), (FAILS, FAILS, FAILS), *[("0", "1", "0")] * 3]
    loop = make_loop(answers, dapo)
    groups, metrics = loop.sample(Timer(), 1)
    assert [g.prompt.index for g in groups] == [0, 3, 4, 5]
    assert metrics["rollout/groups_replaced"] == 2
    assert (metrics["reward/failed"], metrics["reward/groups_dropped"]) == (5, 1)
    hopeless = make_loop([("1", "0")] + [("1", FAILS)] * 50, dapo, "rollout.max_sampling_rounds=3")
    with pytest.raises(NothingToLearnError, match=r"1 of 10 groups .* Besides, 9 of 20 answers could not be graded"):
        hopeless.sample(Timer(), 1)


@pytest.mark.parametrize(
    ("policy", "rewards"),
    [
        ("zero", [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]]),
        ("drop_group", [[None] * 3, [None] * 3, [None] * 3, [0, 1, 1]]),
    ],
)
def test_other_policies_reach_the_step(make_loop, policy, rewards):
    loop = make_loop(MIXED, f"grading.on_failure={policy}", "objective={preset: dr_grpo}")
    result = loop.step(1)
    assert rewards_of(result.batch.groups) == rewards
    assert result.metrics["reward/failed"] == 6


def test_a_run_that_is_to_stop_stops_at_the_first(make_loop):
    with pytest.raises(RewardError, match=r"raised ValueError.* on prompt 0 ") as caught:
        make_loop(MIXED, "grading.on_failure=stop").step(1)
    assert caught.value.exit_code == 1


def test_a_batch_with_groups_without_rewards_is_measured_and_shown(make_loop, tokenizer):
    groups = tuple(make_loop(MIXED).step(1).batch.groups)
    batch = Batch(1, 0, groups)
    assert batch.group_of_episode.tolist() == [0, 0, 3, 3, 3]
    assert batch_metrics(batch) == batch_metrics(Batch(1, 0, (groups[0], groups[3])))
    shown = pick(groups, 99)
    assert len(shown) == 12
    assert [i for g, i in pick(groups[:1], 2)] == [0, 1]
    assert all(rollout_text(g, i, tokenizer) for g, i in shown)


def test_the_source_learns_the_rewards_of_every_group_also_of_those_that_dynamic_sampling_replaces(make_loop):
    answers = [("1", "1"), ("0", "1"), ("1", "0"), ("1", "0"), ("0", "0"), ("1", FAILS, "0")]
    loop = make_loop(answers, "objective.dynamic_sampling=true")
    loop.step(1)
    assert loop.learned == [(0, [1, 1]), (1, [0, 1]), (2, [1, 0]), (3, [1, 0]), (4, [0, 0]), (5, [1, 0])]


SOUND = [("1", "0")] * 4


def test_a_gradient_spike_skips_the_update_is_counted_and_leaves_its_batch(make_loop):
    loop = make_loop(SOUND, "train.skip_grad_norm_above=10", "train.mini_batches=1")
    loop.trainers.norms = [80.0]
    result = loop.step(1)
    assert result.metrics["train/skipped_updates"] == result.metrics["train/steps_skipped_in_a_row"] == 1
    file = dump_path(loop.dumps, 1)
    why = "its gradient norm, 80, is above 10"
    assert loop.said == [f"step 1: an update was skipped, {why}; its batch is {file}"]
    assert rewards_of(read_dump(file).batch.groups) == rewards_of(result.batch.groups)


def test_an_update_within_its_limit_is_made_and_leaves_nothing(make_loop):
    loop = make_loop(SOUND, "train.skip_grad_norm_above=10")
    loop.trainers.norms = [9.0]
    assert loop.step(1).metrics["train/skipped_updates"] == 0
    assert loop.said == []
    assert not loop.dumps.exists()


def test_a_batch_that_cannot_be_kept_does_not_hide_what_went_wrong(make_loop, monkeypatch):
    def no_room(*_):
        raise OSError("no space left")

    loop = make_loop(SOUND)
    loop.trainers.gap = math.nan
    monkeypatch.setattr("pipeline.loop.loop.write_dump", no_room)
    with pytest.raises(DisagreementError):
        loop.step(1)
    assert loop.said == ["step 1: its batch could not be dumped: no space left"]


def test_a_step_whose_engines_disagree_leaves_its_batch(make_loop):
    loop = make_loop(SOUND)
    loop.trainers.gap, loop.trainers.wrong = math.nan, ["weights of trainer rank 1 are not finite: w (1 of 9 numbers)"]
    with pytest.raises(DisagreementError):
        loop.step(1)
    assert dump_path(loop.dumps, 1).is_file()
    assert loop.said == [f"step 1: {loop.trainers.wrong[0]}", f"step 1: its batch is {dump_path(loop.dumps, 1)}"]


@pytest.mark.parametrize("raised", [True, False], ids=["a rank raised", "a rank was lost"])
@pytest.mark.parametrize("call", ["update_policy", "send_weights"])
def test_a_batch_on_which_a_rank_raises_is_kept_but_not_that_of_a_lost_rank(make_loop, monkeypatch, call, raised):
    cause = RayTaskError("update", "", ValueError("no")) if raised else None

    def fail(*_, **__):
        raise TrainerError("trainer rank 1 failed") from cause

    loop = make_loop(SOUND)
    monkeypatch.setattr(loop.trainers, call, fail)
    monkeypatch.setattr(loop.fleet, "transfer", lambda trainers: trainers.send_weights(1))
    with pytest.raises(TrainerError):
        loop.step(1)
    assert dump_path(loop.dumps, 1).is_file() == raised
    assert loop.said == ([f"step 1: its batch is {dump_path(loop.dumps, 1)}"] if raised else [])
