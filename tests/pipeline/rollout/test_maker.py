"""A maker's decisions, one at a time: answers end when the test says so, and no thread and no clock is between."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import Sampling
from pipeline.rewards import RewardError, Verdict
from pipeline.rollout import maker as maker_module
from pipeline.rollout.admission import Admission
from pipeline.rollout.maker import Maker, Recipe
from pipeline.rollout.saved import Saved
from pipeline.types import Prompt, Rollout
from tests.support.fake_answers import FakeJudge, FakePrompts


def rollout(*versions, reason="stop"):
    """One token of each of these versions after a prompt of one token."""
    return Rollout(
        prompt_ids=np.zeros(1, np.int32),
        response_ids=np.zeros(len(versions), np.int32),
        rollout_logprobs=np.full(len(versions), -1.0, np.float32),
        routes=None,
        weight_versions=np.array(versions, np.int32),
        finish_reason=reason,
    )


class Answer:
    """Ends with what `end` is given."""

    def __init__(self, so_far):
        self.so_far = self.rollout = so_far
        self.begun, self.cuts, self.moved = so_far is not None, 0, 0.0
        self.ending = asyncio.get_running_loop().create_future()

    async def result(self):
        return await self.ending

    def cut(self):
        self.cuts += 1


class Answers:
    """`log` has what happened in order; `open` the answers by prompt and sample."""

    def __init__(self):
        self.log, self.open, self.scores = [], {}, 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    def begin(self, prompt, number, sampling, so_far=None):
        self.log.append(f"begin {prompt.index}")
        self.open[prompt.index, number] = answer = Answer(so_far)
        return answer

    @contextlib.asynccontextmanager
    async def interrupted(self):
        yield
        self.log.append("go on")

    async def score(self, rollouts, each):
        self.log.append("score")
        self.scores += 1
        return [(r, np.zeros(1, np.float32), None) for r in rollouts]

    @property
    def servers(self):
        return 1, 0


def maker_of(groups=1, staleness=2, ahead=1, *, verdict=None, order="finish", version=1, **changes):
    setting = {"samples": 1, "sampling": Sampling(4, 1.0), "informative": None, "on_failure": "exclude", "least": 1}
    setting |= {"most_dropped": 9}
    recipe = Recipe(**setting | {"scored": 2, "limit_s": 60.0} | changes)
    judge = FakeJudge(verdict or (lambda *_: Verdict(reward=1.0)))
    admission = Admission(groups, staleness, ahead, order=order, version=version)
    return Maker(admission, FakePrompts(), Answers(), judge, recipe)


async def settle():
    """What is ready now happens."""
    for _ in range(20):
        await asyncio.sleep(0)


async def end(maker, index, *versions, number=0):
    maker.answers.open[index, number].ending.set_result(rollout(*versions))
    await settle()


def within(maker, work):
    """Run `work(maker)` inside the maker's life."""

    async def run():
        async with maker:
            await settle()
            return await asyncio.wait_for(work(maker), 10)

    return asyncio.run(run())


async def step(maker, version):
    """Take the groups of a step, and let the servers hold `version` after it."""
    taken = await maker.take()
    await maker.pause()
    await maker.resume(version)
    await settle()
    return taken


@pytest.mark.parametrize("versions", [(0,), (2,), (1, 2)])
def test_an_answer_of_weights_that_were_not_held_while_it_was_open_is_an_error(versions):
    async def work(maker):
        await end(maker, 0, *versions)
        with pytest.raises(AnswerError, match="held 1 to 1"):
            await maker.take()

    within(maker_of(), work)


def test_of_several_errors_the_first_is_raised():
    async def work(maker):
        for index, words in enumerate(("the first", "the second")):
            maker.answers.open[index, 0].ending.set_exception(AnswerError(words))
            await settle()
        with pytest.raises(AnswerError, match="the first"):
            await maker.take()

    within(maker_of(), work)


def test_a_group_with_an_answer_of_the_weights_before_does_not_become_younger():
    async def work(maker):
        await end(maker, 0, 1, number=0)
        await end(maker, 0, 1, number=1)
        await end(maker, 1, 1, number=0)  # its other answer waits in front of the servers
        await step(maker, 2)
        assert maker.admission.open[1].oldest == 1

    within(maker_of(samples=2), work)


def test_scores_are_of_the_weights_of_the_step_that_gets_them():
    async def work(maker):
        await end(maker, 0, 1)
        maker.answers.open[1, 0].begun = True
        assert (await step(maker, 2))[1] == []
        await end(maker, 1, 1)
        await end(maker, 2, 2)
        assert len((await step(maker, 3))[1]) == 1, "none of its rollouts is of version 2 alone"
        assert maker.answers.scores == 2, "group 2 was there, ahead, when version 3 came"
        assert len((await step(maker, 4))[1]) == 1
        await end(maker, 3, 4)
        assert (await step(maker, 5))[1] == []
        assert maker.answers.scores == 2

    within(maker_of(), work)


def test_what_is_ahead_is_scored_before_anything_goes_on_or_begins():
    async def work(maker):
        await end(maker, 0, 1)
        await end(maker, 1, 1)
        maker.answers.log.clear()
        await step(maker, 2)
        assert maker.answers.log == ["score", "go on", "begin 2"]

    within(maker_of(), work)


def test_the_limit_of_a_step_s_wait_begins_anew_with_what_gets_further(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(maker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def work(maker):
        waiting = asyncio.create_task(maker.take())
        await settle()
        now[0] = 0.009
        await end(maker, 0, 1, number=0)
        now[0] = 0.015
        await asyncio.sleep(0.03)
        late = maker.answers.open[0, 1]
        assert late.cuts == 0, "0.006 s ago an answer of its group ended"
        now[0], late.moved = 0.02, 0.018
        await asyncio.sleep(0.03)
        assert late.cuts == 0, "0.002 s ago a token of it came"
        now[0] = 0.03
        while not late.cuts:
            await asyncio.sleep(0.001)
        assert maker.answers.open[1, 0].cuts == 0, "the step does not wait for this one"
        late.ending.set_result(rollout(1, reason="time"))
        await waiting

    within(maker_of(samples=2, limit_s=0.01, order="admission"), work)


def test_how_groups_in_a_row_ended_is_counted_since_the_last_that_was_finished():
    async def work(maker):
        await end(maker, 0, 1)  # says nothing
        await end(maker, 1, 1)  # is finished
        await end(maker, 2, 1)
        assert maker.error is None
        await end(maker, 3, 1)
        with pytest.raises(RewardError, match="of 2 groups in a row nothing is left"):
            await maker.take()

    failed = Verdict(kind="raised", what="raised ValueError", verifier="fake")
    rewards = {0: Verdict(reward=0.0), 1: Verdict(reward=1.0)}
    informative = {"informative": lambda group: group.rewards.any()}
    maker = maker_of(verdict=lambda prompt, _: rewards.get(prompt, failed), most_dropped=2, **informative)
    within(maker, work)


def test_the_mean_length_of_what_is_open_is_of_sampled_tokens_parts_included():
    async def work(maker):
        maker.answers.open[0, 0].rollout = rollout(1, 1, 1)
        await end(maker, 1, 1, number=1)
        metrics, _ = maker.metrics()
        assert metrics["rollout/open_length_mean"] == 2

    within(maker_of(samples=2), work)


def saved_with(parts):
    """Of version 3, with one open group of version 1 and these answers of it."""
    admission = Admission(1, 4, 1, version=1)
    admission.admit(0)
    state = admission.state() | {"version": 3}
    return Saved(state, {"prompts": 1, "supervised": 0}, {}, {0: (Prompt(np.zeros(1, np.int32), ""), parts)})


def test_a_part_of_an_answer_is_gone_on_with_and_is_in_the_next_checkpoint_whenever_that_is():
    part, whole = rollout(2, 2, reason="abort"), rollout(2)

    async def run():
        maker = maker_of(samples=2, staleness=4)
        maker.prompts.cursor = 1
        maker.restore(saved_with({0: part, 1: whole}))
        before = await maker.snapshot()
        async with maker:
            await settle()
            during = await maker.snapshot()
            assert (0, 1) not in maker.answers.open, "what was whole is not sampled again"
            asked = maker.answers.open[0, 0].so_far
        return asked, before, during

    asked, *snapshots = asyncio.run(run())
    assert asked is part
    for saved in snapshots:
        _, parts = saved.open[0]
        assert [(r.finish_reason, len(r)) for r in (parts[0], parts[1])] == [("abort", 2), ("stop", 1)]


def test_what_a_checkpoint_has_of_an_unfinished_answer_is_a_part_whatever_the_request_before_it_said():
    async def work(maker):
        maker.answers.open[0, 0].rollout = rollout(1, 1, reason="stop")
        saved = await maker.snapshot()
        assert saved.open[0][1][0].finish_reason == "abort"

    within(maker_of(), work)


@pytest.mark.parametrize(("parts", "oldest"), [({}, 3), ({0: rollout(2, 3, reason="abort")}, 2), ({1: rollout(1)}, 1)])
def test_an_open_group_of_a_checkpoint_is_as_old_as_what_there_is_of_it(parts, oldest):
    maker = maker_of(samples=2, staleness=4)
    maker.restore(saved_with(parts))
    assert maker.admission.open[0].oldest == oldest
