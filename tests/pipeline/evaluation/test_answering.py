"""Every question is answered and graded once, under one version, however it ends."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import pytest

from pipeline.config import load_config
from pipeline.evaluation.answering import EvaluationError, GivenUp, ask
from pipeline.evaluation.result import evaluation_of
from pipeline.loop.evaluations import evaluate_set
from pipeline.rewards import Grader, RewardError
from pipeline.rollout.grading import OwnGraders, OwnGrading

SMALL_STEPS = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2"]
GRADING = load_config("configs/quickstart.yaml").grading


def answers_of(three, servers, **settings):
    with OwnGraders(three.tokenizer).open(three.rewards, GRADING) as grading:
        return asyncio.run(ask(three, servers, grading, **({"at_once": 99} | settings)))


def test_scores_are_those_of_the_answers_counted_by_hand(three, fake_servers):
    """Question i has i right answers of four."""
    servers = fake_servers()
    answers = answers_of(three, servers)
    assert [(a.prompt.index, a.sample) for a in answers] == [(q, s) for q in range(3) for s in range(4)]
    found = evaluation_of(three, answers, step=7, version=3, seconds=1.5)
    scores = {name: score.value for name, score in found.scores.items()}
    assert scores == {
        "reward": pytest.approx(3 / 12),
        "pass@1": pytest.approx(3 / 12),
        "pass@2": pytest.approx((0 + 1 / 2 + (1 - 1 / 6)) / 3),
        "pass@4": pytest.approx(2 / 3),
        "majority@2": pytest.approx((0 + 1 / 4 + 1 / 6 + 4 / 6 / 2) / 3),
        "majority@4": pytest.approx((0 + 0 + 1 / 2) / 3),
    }
    assert found.scores["pass@4"].questions == 3
    assert all(score.low <= score.value <= score.high for score in found.scores.values())
    metrics = found.metrics()
    assert metrics["eval/three/pass@4"] == scores["pass@4"]
    assert metrics["eval/three/pass@4_low"] < scores["pass@4"] < metrics["eval/three/pass@4_high"]
    assert metrics["eval/three/failed"] == 0
    row = json.loads(json.dumps(found.row()))
    assert (row["step"], row["set"], row["version"], row["questions"]) == (7, "three", 3, 3)
    assert row["scores"]["pass@4"][0] == scores["pass@4"]
    assert "pass@4 0.667" in str(found)


def test_rows_hold_what_was_asked_and_answered(three, fake_servers):
    rows = evaluation_of(three, answers_of(three, fake_servers()), step=0, version=3, seconds=1).answers
    last = rows[8]
    assert (last["question"], last["sample"], last["passed"], last["reward"]) == (2, 0, True, 1.0)
    assert last["response"] == last["given"] == last["metadata"]["answer"]
    assert last["prompt"] == three.prompts[2].text
    assert (last["finish_reason"], last["tokens"]) == ("stop", len(last["response"]) + 1)
    json.dumps(rows, allow_nan=False)


def test_an_answer_that_was_cut_is_counted_and_is_no_vote(three, fake_servers):
    found = evaluation_of(three, answers_of(three, fake_servers(reason="length", text=lambda q, s: "00000000")),
                          step=0, version=3, seconds=1)  # fmt: skip
    assert found.numbers["truncated_fraction"] == 1
    assert found.numbers["length_mean"] == 8
    assert all(answer["given"] is None for answer in found.answers)


def test_a_token_of_other_weights_ends_the_evaluation(three, fake_servers):
    with pytest.raises(EvaluationError, match=r"three is of version 3 .* has tokens of \[2\]"):
        answers_of(three, fake_servers(sampled_under=2))


def test_no_more_answers_are_in_flight_than_asked_for(three, fake_servers):
    few, many = (fake_servers(wait=lambda: asyncio.sleep(0.01)) for _ in range(2))
    answers_of(three, few, at_once=5)
    answers_of(three, many)
    assert (few.most, many.most) == (5, 12)


def test_it_ends_soon_where_it_is_asked_to_and_leaves_no_request(three, fake_servers):
    servers = fake_servers(wait=asyncio.Event().wait)
    with pytest.raises(GivenUp, match="SIGTERM"):
        answers_of(three, servers, give_up=lambda: "SIGTERM" if servers.in_flight else None)
    assert (servers.in_flight, servers.entered) == (0, 0)


def test_an_error_of_a_server_is_what_is_seen(three, fake_servers):
    async def fail():
        raise RewardError("gone")

    with pytest.raises(RewardError, match="gone"):
        answers_of(three, fake_servers(wait=fail))


def test_answers_that_a_verifier_fails_on_are_in_no_score_and_counted(three, fake_servers):
    servers = fake_servers(text=lambda question, sample: "!" if sample == 0 or question == 0 else "1")
    with Grader("tests.support.hostile:number", workers=1) as grader:  # "!" is no number
        answers = asyncio.run(ask(three, servers, OwnGrading(grader, three.tokenizer), at_once=99))
    found = evaluation_of(three, answers, step=0, version=3, seconds=1)
    assert found.numbers["failed"] == 6
    assert found.scores["pass@1"].questions == 2, "the first question has no answer that was graded"
    assert found.scores["pass@2"].questions == 2
    assert "pass@4" not in found.scores, "no question has four answers that were graded"
    assert "6 not graded" in str(found)
    assert not any(math.isnan(value) for value in found.metrics().values())
    assert sum(answer["failure"] is not None for answer in found.answers) == 6


def test_every_answer_draws_from_a_stream_of_its_own_where_streams_have_seeds(three, fake_servers):
    servers = fake_servers()
    answers_of(replace(three, sampling=replace(three.sampling, seed=0)), servers)
    assert len(set(servers.seeds)) == 12


def test_an_evaluation_says_which_weights_answered_after_which_step(three, fake_servers):
    servers = fake_servers(wait=lambda: asyncio.sleep(0))
    found = evaluate_set(three, servers, load_config("configs/quickstart.yaml", SMALL_STEPS), step=7)
    assert (found.name, found.step, found.version, found.questions) == ("three", 7, 3, 3)
    assert servers.most == 4, "as many at once as a step has answers"


def test_progress_is_told(three, fake_servers):
    told = []
    answers_of(three, fake_servers(), done=lambda graded, total: told.append((graded, total)))
    assert told == [(i + 1, 12) for i in range(12)]
