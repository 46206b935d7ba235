"""One answer of a fleet that is made up: from its first token or from what was saved of it, to its end or to a cut."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.engine.control import UnreachableError
from pipeline.engine.fleet import ServerState
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from pipeline.rollout.answers import FleetAnswers
from pipeline.rollout.sampler import of_sample
from pipeline.types import Prompt, Sampled
from tests.support.episodes import plain_rollout

PROMPT = Prompt(np.zeros(1, np.int32), "a prompt", {}, 7)
SAMPLING = Sampling(max_new_tokens=5, temperature=1.0, seed=1)


def part(tokens, reason="stop", version=3):
    return Sampled(
        ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -1.0, np.float32),
        routes=None,
        weight_versions=np.full(tokens, version, np.int32),
        finish_reason=reason,
    )


class FakeFleet:
    """Requests get these parts in turn; None hangs."""

    def __init__(self, *parts, servers=()):
        self.parts, self.asked, self.servers = list(parts), [], list(servers)

    async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=None):
        self.asked.append((list(token_ids), sampling, group))
        answer = self.parts.pop(0)
        return await asyncio.sleep(1000) if answer is None else answer

    async def score(self, token_ids):
        return np.full(len(token_ids) - 1, -9.0, np.float32), None


def server(state=ServerState.SERVING, error=None, in_flight=0):
    scored = []

    async def score(ids):
        scored.append(len(ids))
        if error is not None:
            raise error
        return np.full(len(ids) - 1, -1.0, np.float32), None

    return SimpleNamespace(state=state, client=SimpleNamespace(score=score), scored=scored, in_flight=in_flight)


def test_an_answer_that_is_interrupted_goes_on_and_keeps_what_it_has():
    fleet = FakeFleet(part(2, "abort", version=3), part(1, version=4))
    rollout = asyncio.run(FleetAnswers(fleet, "abort").begin(PROMPT, 2, SAMPLING).result())
    assert rollout.weight_versions.tolist() == [3, 3, 4]
    assert [(len(ids), sampling.max_new_tokens, group) for ids, sampling, group in fleet.asked] == [
        (1, 5, 7),
        (3, 3, 7),
    ]


def test_samples_of_a_prompt_draw_from_neighbouring_streams():
    fleet = FakeFleet(part(1), part(1))

    async def both():
        answers = FleetAnswers(fleet, "abort")
        for number in (0, 1):
            await answers.begin(PROMPT, number, SAMPLING).result()

    asyncio.run(both())
    first, second = (sampling.seed for _, sampling, _ in fleet.asked)
    assert second == first + 1


def test_each_prompt_and_each_run_seed_has_streams_of_its_own():
    other = replace(PROMPT, index=8)
    seeds = [of_sample(replace(SAMPLING, seed=seed), p, 0).seed for seed in (1, 2) for p in (PROMPT, other)]
    assert len({seed // 1000 for seed in seeds}) == 4
    assert seeds[0] == of_sample(SAMPLING, PROMPT, 0).seed
    unseeded = replace(SAMPLING, seed=None)
    assert of_sample(unseeded, PROMPT, 1) == unseeded


def test_what_was_saved_of_an_answer_counts_against_its_limit():
    fleet = FakeFleet(part(1))
    so_far = plain_rollout([1, 2], -np.ones(2), version=2, finish_reason="abort")
    rollout = asyncio.run(FleetAnswers(fleet, "abort").begin(PROMPT, 0, SAMPLING, so_far).result())
    assert rollout.weight_versions.tolist() == [2, 2, 3]
    assert fleet.asked[0][1].max_new_tokens == 3
    whole = plain_rollout(range(5), -np.ones(5), version=2, finish_reason="abort")
    rollout = asyncio.run(FleetAnswers(fleet, "abort").begin(PROMPT, 0, SAMPLING, whole).result())
    assert (len(rollout), rollout.finish_reason) == (5, "length")


@pytest.mark.parametrize(("parts", "tokens"), [([None], 0), ([part(2, "abort"), None], 2)])
def test_an_answer_that_is_cut_has_what_had_come(parts, tokens):
    async def cut():
        answer = FleetAnswers(FakeFleet(*parts), "abort").begin(PROMPT, 0, SAMPLING)
        sampled = asyncio.create_task(answer.result())
        await asyncio.sleep(0.01)
        answer.cut()
        return await sampled

    rollout = asyncio.run(cut())
    assert (rollout is None) == (tokens == 0)
    if rollout is not None:
        assert (len(rollout), rollout.finish_reason) == (tokens, "time")


def one_turn(answers):
    return answers.begin(PROMPT, 0, SAMPLING)


def many_turns(answers):
    answers.attempts = SimpleNamespace(
        begin=lambda *_: SimpleNamespace(play=lambda: asyncio.sleep(1000), begun=True, moved=0.0)
    )
    return answers.begin(PROMPT, 0, SAMPLING)


@pytest.mark.parametrize("begin", [one_turn, many_turns])
def test_who_gives_an_answer_up_that_is_just_being_cut_gets_none(begin):
    """Else it would be graded, while the run waits for its end."""

    async def cut_and_give_up():
        answer = begin(FleetAnswers(FakeFleet(part(2, "abort"), None), "abort"))
        sampled = asyncio.create_task(answer.result())
        await asyncio.sleep(0.01)
        answer.cut()
        sampled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sampled

    asyncio.run(cut_and_give_up())


@pytest.mark.parametrize(("how", "begun"), [("abort", False), ("drain", False), ("in_place", True), ("retract", True)])
def test_a_request_that_stands_still_may_have_tokens_that_one_that_is_cut_has_not(how, begun):
    async def ask():
        answer = FleetAnswers(FakeFleet(None), how).begin(PROMPT, 0, SAMPLING)
        assert not answer.begun
        task = asyncio.create_task(answer.result())
        await asyncio.sleep(0.01)
        found = answer.begun
        task.cancel()
        return found

    assert asyncio.run(ask()) == begun


ROLLOUTS = [plain_rollout(range(n), -np.ones(n)) for n in (1, 2, 3, 4)]


def score(*servers, each=2):
    return asyncio.run(FleetAnswers(FakeFleet(servers=servers), "abort").score(ROLLOUTS, each))


def test_every_server_scores_its_share_those_that_stand_still_too():
    servers = [server(), server(ServerState.PAUSED), server(ServerState.LOST)]
    assert len(score(*servers)) == 4
    assert [len(s.scored) for s in servers] == [2, 2, 0]


def test_a_server_that_is_lost_meanwhile_leaves_the_scores_of_others():
    assert len(score(server(), server(error=UnreachableError("gone")))) == 2
    assert [logprobs[0] for _, logprobs, _ in score(server(error=UnreachableError("gone")))] == [-9, -9]
    with pytest.raises(ServerError, match="no such thing"):
        score(server(error=ServerError("no such thing")))


def test_servers_that_take_requests_are_counted_and_those_that_have_none():
    fleet = FakeFleet(servers=[server(), server(in_flight=3), server(ServerState.LOST)])
    assert FleetAnswers(fleet, "abort").servers == (2, 1)
