"""A reward model and a judge, each a small real server that answers as such servers do."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from aiohttp import web

from pipeline.config.rewards import CodeReward, GradingConfig, JudgeReward, RewardModelReward
from pipeline.rewards import Question, VerifierError, check_rewards, open_grader
from pipeline.types import Prompt
from tests.support.http_service import HttpService

IDS = np.zeros(3, np.int32)
FAST = GradingConfig(timeout_s=10, workers=8)


class Server(HttpService):
    """What is POSTed goes to `answer(path, headers, body)`, which gives (status, JSON)."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    async def heard(self, request):
        body = await request.json()
        self.asked.append((request.path, request.headers.get("Authorization"), body))
        said = self.answer(body)
        if asyncio.iscoroutine(said):
            said = await said
        status, answer = said
        return web.json_response(answer, status=status)


def question(response="an answer", **metadata):
    return Question(Prompt(IDS, "a question?", metadata, 0), response, IDS, "stop")


def asked(reward, *questions, grading=FAST):
    with open_grader([reward], grading) as grader:
        return grader.ask(questions)


def test_a_reward_model_is_sent_what_the_body_says_and_its_number_is_the_reward(monkeypatch):
    monkeypatch.setenv("MODEL_KEY", "secret")
    body = {"model": "rm", "text": ["{prompt}{response}"], "level": "{level}", "braces": '{"a": 1}'}
    with Server(lambda body: (200, [{"embedding": [0.25]}])) as server:
        reward = RewardModelReward(
            url=f"{server.url}/classify", body=body, reward_at="0.embedding.0", key_variable="MODEL_KEY"
        )
        (verdict,) = asked(reward, question("{level} {prompt}", level=3))
    assert verdict.reward == 0.25
    sent = {"model": "rm", "text": ["a question?{level} {prompt}"], "level": "3", "braces": '{"a": 1}'}
    assert server.asked == [("/classify", "Bearer secret", sent)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {"score": 1}), "there is no reward in the answer {'score': 1}"),
        ((200, {"reward": "1"}), "reward of the answer is 1, which is no number"),
        ((200, {"reward": True}), "reward of the answer is True, which is no number"),
        ((404, {}), "answered 404: {}"),
    ],
)
def test_an_answer_without_a_number_is_a_failure(answer, words):
    with Server(lambda body: answer) as server:
        (verdict,) = asked(RewardModelReward(url=server.url), question())
    assert verdict.kind == "raised"
    assert words in verdict.what


def test_a_server_that_is_busy_is_asked_again_and_one_that_hangs_is_a_timeout():
    busy = iter([(503, {}), (429, {}), (200, {"reward": 1.0})])

    async def hang(body):
        await asyncio.sleep(2)
        return 200, {}

    with Server(lambda body: next(busy)) as server:
        assert asked(RewardModelReward(url=server.url), question())[0].reward == 1.0
    with Server(hang) as server:
        (verdict,) = asked(RewardModelReward(url=server.url, timeout_s=0.5), question())
    assert (verdict.kind, verdict.what) == ("timeout", "took more than 0.5 s")
    (verdict,) = asked(RewardModelReward(url="http://127.0.0.1:9", timeout_s=0.5), question())
    assert verdict.kind == "timeout"
    assert verdict.what.startswith("took more than 0.5 s; it had printed ")
    assert "http://127.0.0.1:9 cannot be reached: " in verdict.what


def test_a_server_that_does_not_listen_is_refused_before_anything_starts():
    words = r"the verifier 'reward_model' asks http://127.0.0.1:9, which cannot be reached: .*; start that server first"
    with pytest.raises(VerifierError, match=words):
        check_rewards([RewardModelReward(url="http://127.0.0.1:9")], FAST)
    sandbox = {"mode": "remote", "url": "http://127.0.0.1:9"}
    with pytest.raises(VerifierError, match=r"the verifier 'code' asks http://127.0.0.1:9, which cannot be reached"):
        check_rewards([CodeReward.model_validate({"sandbox": sandbox})], FAST)
    with Server(lambda body: (200, {"reward": 1.0})) as server:
        check_rewards([RewardModelReward(url=server.url)], FAST)


def test_eight_answers_wait_for_a_server_at_the_same_time():
    at_once = [0, 0]

    async def slow(body):
        at_once[0] += 1
        at_once[1] = max(at_once)
        await asyncio.sleep(0.5)
        at_once[0] -= 1
        return 200, {"reward": 1.0}

    with Server(slow) as server:
        verdicts = asked(RewardModelReward(url=server.url), *[question()] * 16)
    assert [v.reward for v in verdicts] == [1.0] * 16
    assert at_once[1] == 8


def judge(url, **more):
    template = "Is {response} a good answer to {prompt}? The right one is {answer}. End with Score: N"
    return JudgeReward(url=f"{url}/v1", model="big", template=template, **more)


def says(content):
    return lambda body: (200, {"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.mark.parametrize(
    ("content", "reward"),
    [("Good. Score: 7", 0.7), ("Score: 2? No.\n**Score:** 10", 1.0), ("score 0", 0.0), ("SCORE: 2.5", 0.25)],
)
def test_a_judge_scores_on_its_scale(content, reward):
    with Server(says(content)) as server:
        (verdict,) = asked(judge(server.url), question("Score: 10", answer="42"))
    assert verdict.reward == pytest.approx(reward)
    ((path, key, body),) = server.asked
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", None, "big", 0.0)
    words = "Is Score: 10 a good answer to a question?? The right one is 42. End with Score: N"
    assert body["messages"] == [{"role": "user", "content": words}]


@pytest.mark.parametrize(("content", "reward"), [("Score: -1", 0.0), ("**Score:** -0.5", 0.25), ("Score:1", 1.0)])
def test_a_score_below_0_keeps_its_sign(content, reward):
    with Server(says(content)) as server:
        (verdict,) = asked(judge(server.url, scale=(-1, 1)), question(answer="42"))
    assert verdict.reward == pytest.approx(reward)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("I cannot say.", "the judge names no score: 'I cannot say.'"),
        ("Score: -3", "the judge's score -3 is off the scale from 0 to 10"),
        ("Score: 11", "the judge's score 11 is off the scale from 0 to 10"),
        (None, "the judge's message is None, no text"),
    ],
)
def test_a_judge_that_names_no_score_says_nothing_of_the_answer(content, words):
    with Server(says(content)) as server:
        (verdict,) = asked(judge(server.url), question(answer="42"))
    assert verdict.kind == "raised"
    assert words in verdict.what


def test_a_name_that_the_prompt_lacks_and_a_key_that_is_not_set_are_named(monkeypatch):
    with Server(says("Score: 1")) as server:
        (verdict,) = asked(judge(server.url), question())
    assert "raised KeyError: 'answer'" in verdict.what
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with (
        Server(says("Score: 1")) as server,
        pytest.raises(VerifierError, match="key_variable: the environment has no NO_SUCH_KEY; set it"),
    ):
        check_rewards([judge(server.url, key_variable="NO_SUCH_KEY")], FAST)


def test_a_key_is_there_for_the_verifier_that_names_it_alone(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "one")
    monkeypatch.setenv("OTHER_KEY", "two")
    grader = open_grader([judge("http://127.0.0.1:9", key_variable="JUDGE_KEY")], FAST)
    assert grader.surroundings.variables.keys() & {"JUDGE_KEY", "OTHER_KEY"} == {"JUDGE_KEY"}
