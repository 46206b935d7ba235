"""Several verifiers of one answer: their weighted sum, a metric each, side by side; one that fails fails the answer."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from pipeline.observe.metrics import batch_metrics
from pipeline.rewards import Component, Grader, Question, RewardError
from pipeline.rewards.grade import grade
from pipeline.rollout.grading import OwnGrading
from pipeline.step import Batch
from pipeline.types import Episode, Group, Prompt
from tests.support.episodes import plain_rollout
from tests.support.hostile import question

HOSTILE = {"kind": "function", "function": "tests.support.hostile:verify"}
LATER = {"kind": "function", "function": "tests.support.hostile:verify_later"}
LENGTH = {"kind": "length", "free_tokens": 2, "full_tokens": 4}


def of(source):
    """A question that is answered right, of a prompt of a source."""
    one = question("right")
    return dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, origin=f"{source}:7"))


def test_the_reward_is_the_weighted_sum_and_each_part_is_told():
    components = [Component("one", HOSTILE, weight=2.0), Component("short", LENGTH, weight=0.5)]
    with Grader(components, workers=2) as grader:
        right, half = grader.ask([question("right"), question("half")])
    assert (right.reward, half.reward) == (2.0 - 0.25, 1.0 - 0.25)
    assert [part.reward for part in half.parts.values()] == [0.5, -0.5]


def test_one_that_fails_fails_the_answer_and_is_named_and_the_others_are_told():
    components = [Component("short", LENGTH), Component("one", HOSTILE)]
    with Grader(components, workers=2) as grader:
        raised, right = grader.ask([question("raise"), question("right")])
    assert (raised.reward, raised.kind, raised.verifier) == (None, "raised", "tests.support.hostile:verify")
    assert [part.reward for part in raised.parts.values()] == [-0.5, None]
    assert right.reward == 0.5


def test_a_verifier_grades_the_sources_that_it_names_and_no_others():
    components = [
        Component("sums", HOSTILE, sources=("sums", "gym")),
        Component("short", LENGTH),
        Component("rest", HOSTILE, weight=3.0, sources=("other",)),
    ]
    named = [of(name) for name in ("sums", "gym.countdown", "other", "third")]
    with Grader(components, workers=2) as grader:
        verdicts = grader.ask(named)
    assert [list(verdict.parts) for verdict in verdicts] == [["sums", "short"]] * 2 + [["short", "rest"], ["short"]]
    assert [verdict.reward for verdict in verdicts] == [0.5, 0.5, 2.5, -0.5]


def test_a_question_that_no_verifier_grades_ends_the_run():
    with (
        Grader([Component("sums", HOSTILE, sources=("sums",))], workers=1) as grader,
        pytest.raises(RewardError, match="no verifier grades the source 'third'"),
    ):
        grader.ask([of("third")])


def test_each_has_a_time_limit_of_its_own():
    components = [Component("quick", HOSTILE, timeout_s=0.3), Component("slow", LATER, timeout_s=5.0)]
    with Grader(components, workers=4) as grader:
        grader.wait_ready()
        (slow,) = grader.ask([question("slow")])
    assert [(part.kind, part.reward) for part in slow.parts.values()] == [("timeout", None), (None, 1.0)]
    assert slow.what == "took more than 0.3 s"


def test_components_of_one_answer_are_graded_at_the_same_time():
    with Grader([Component(f"part_{i}", HOSTILE) for i in range(8)], workers=8) as grader:
        grader.wait_ready()
        start = time.monotonic()
        (verdict,) = grader.ask([question("slow")])
        assert time.monotonic() - start < 3.5  # one after the other: 4 s
    assert verdict.reward == 8.0
    assert 0.5 <= verdict.seconds < 2.0


def test_a_sum_that_no_float32_holds_is_a_failure():
    with Grader([Component("one", HOSTILE, weight=4.0)], workers=1) as grader:
        (verdict,) = grader.ask([question("largest")])
    assert verdict.kind == "not_a_number"
    assert "makes the reward 1.36113e+39, which is no finite number of float32" in verdict.what


def test_length_counts_sampled_tokens_of_the_whole_episode_and_each_component_is_a_metric():
    class Words:
        def decode(self, ids, skip_special_tokens):
            return "x" * len(ids)

    group = Group.of_single_turns(Prompt(np.zeros(1, np.int32), "q", {}, 0), [plain_rollout([1, 2, 3], np.zeros(3))])
    with Grader([Component("short", LENGTH), Component("long", LENGTH | {"full_tokens": 3})]) as grader:
        (graded,), _ = grade([group], OwnGrading(grader, Words()))
    assert graded.episodes[0].reward == -1.5
    metrics = batch_metrics(Batch(1, 0, (graded,)))
    assert (metrics["reward/short"], metrics["reward/long"]) == (-0.5, -1.0)


def test_the_metrics_of_components_add_up_to_the_reward_of_what_a_step_trains_on():
    def episode(reward, **parts):
        one = Episode((plain_rollout([1, 2, 3], np.zeros(3)),), reward=reward, parts=parts)
        return one if reward is not None else dataclasses.replace(one, failure="it raised")

    prompt = Prompt(np.zeros(1, np.int32), "q", {}, 0)
    own = (episode(2.5, a=1.0, b=0.5), episode(0.0, a=0.0, b=0.0), episode(None, a=1.0))
    metrics = batch_metrics(Batch(1, 0, (Group(prompt, own),)))
    assert (metrics["reward/a"], metrics["reward/b"], metrics["reward/mean"]) == (0.5, 0.25, 1.25)


@pytest.mark.parametrize("count", [1, 2])
def test_quick_ones_share_one_worker(count):
    with Grader([Component(f"part_{i}", LENGTH) for i in range(count)], workers=8) as grader:
        grader.wait_ready()
        verdicts = grader.ask([Question(q.prompt, "", q.response_ids, "stop") for q in [question()] * 500])
    assert {v.reward for v in verdicts} == {-0.5 * count}
