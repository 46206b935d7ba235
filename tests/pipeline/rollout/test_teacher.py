"""A teacher on the road of an answer: what it is asked, and what becomes of what it says."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from pipeline.rollout.maker import Maker
from pipeline.rollout.teacher import Teacher
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.types import Episode, Sampled
from tests.pipeline.rollout.test_maker import end, maker_of, rollout, settle, within


class Scoring:
    """Says the place of each token; waits for `gate`."""

    def __init__(self):
        self.asked, self.inside, self.gate = [], 0, asyncio.Event()

    async def __aenter__(self):
        self.inside += 1
        return self

    async def __aexit__(self, *_):
        self.inside -= 1

    async def teach(self, token_ids, start, top_k):
        assert self.inside
        self.asked.append((len(token_ids), start, top_k))
        await self.gate.wait()
        return TeacherScores(-np.arange(start, len(token_ids)).astype(np.float32))


def taught(maker: Maker) -> Scoring:
    maker.teacher = Teacher(Scoring(), top_k=0)
    return maker.teacher.scoring


def test_every_rollout_is_scored_once_after_its_prompt_and_one_that_nobody_sampled_never():
    scoring = Scoring()
    scoring.gate.set()
    teacher = Teacher(scoring, top_k=4)
    silent = {"trained": np.zeros(1, bool), "weight_versions": np.full(1, -1, np.int32)}
    mute = dataclasses.replace(rollout(1), rollout_logprobs=np.zeros(1, np.float32), **silent)

    async def run():
        async with teacher:
            once = await teacher.scored(Episode((rollout(1, 1), mute, rollout(1, 1, 1)), reward=1.0))
            return once, await teacher.scored(once)

    once, twice = asyncio.run(run())
    assert scoring.asked == [(3, 1, 4), (4, 1, 4)]
    assert [None if r.teacher is None else r.teacher.logprobs.tolist() for r in once.rollouts] == [
        [-1, -2], [0], [-1, -2, -3],
    ]  # fmt: skip
    assert twice == once
    assert once.reward == 1.0
    metrics = teacher.metrics()
    assert metrics["teacher/tokens"] == 5
    assert metrics["teacher/score_s"] >= 0
    assert teacher.metrics() == {"teacher/tokens": 0}


def test_what_goes_on_drops_what_was_said_of_a_part():
    whole = dataclasses.replace(rollout(1, 1), teacher=TeacherScores(np.zeros(2, np.float32)))
    more = Sampled(np.zeros(1, np.int32), np.zeros(1, np.float32), None, np.ones(1, np.int32), "stop")
    assert dataclasses.replace(whole, finish_reason="length").teacher is not None
    assert whole.extended(more).teacher is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": np.zeros(2)}, "logprobs is float64"),
        ({"logprobs": np.array([0, np.nan], np.float32)}, "not finite"),
        ({"top_ids": np.zeros((2, 1), np.int32)}, "come with their log-probs"),
        ({"top_ids": np.zeros((1, 1), np.int32), "top_logprobs": np.zeros((1, 1), np.float32)}, "for 2 tokens"),
        ({"top_ids": np.zeros((2, 2), np.int32), "top_logprobs": np.zeros((2, 1), np.float32)}, "for 2 tokens"),
    ],
)
def test_scores_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TeacherScores(**{"logprobs": np.zeros(2, np.float32)} | changes)
    with pytest.raises(ValueError, match="scores are of other tokens"):
        dataclasses.replace(rollout(1), teacher=TeacherScores(np.zeros(2, np.float32)))


def test_a_group_ends_when_it_is_graded_and_scored_and_a_snapshot_before_is_scored_after_it():
    async def work(maker):
        scoring = maker.teacher.scoring
        await end(maker, 0, 1)
        saved = await maker.snapshot()
        assert list(saved.open) == [0, 1]
        assert maker.admission.ready() is None, "nobody has scored it"
        assert saved.open[0][1][0].teacher is None
        scoring.gate.set()
        await settle()
        groups, _ = await maker.take()
        assert groups[0].rollouts[0].teacher is not None
        return saved

    maker = maker_of()
    taught(maker)
    saved = within(maker, work)

    async def resumed(maker):
        groups, _ = await maker.take()
        return groups[0].rollouts[0]

    again = maker_of()
    taught(again).gate.set()
    again.restore(saved)
    assert within(again, resumed).teacher is not None


def test_a_finished_group_that_nobody_has_scored_is_scored_when_a_step_takes_it():
    """Of a checkpoint that was saved with another teacher, or none."""

    async def finished(maker):
        await end(maker, 0, 1)
        await settle()
        return await maker.snapshot()

    saved = within(maker_of(), finished)
    assert list(saved.finished) == [0]
    again = maker_of()
    taught(again).gate.set()
    again.restore(saved)

    async def take(maker):
        return (await maker.take())[0]

    (group,) = within(again, take)
    assert group.rollouts[0].teacher is not None
    assert again.teacher.scoring.asked == [(2, 1, 0)]
