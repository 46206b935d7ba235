"""A session's sequence grows and never changes, however its answer comes."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import Piece, Sampling
from pipeline.rollout.session import Session
from pipeline.types import Sampled

STOP = Sampling(max_new_tokens=10, temperature=1.0)


class Engine:
    """Samples 100, 101, ... and gives token t at place p the route [t, p]; each request brings as many as `cuts` says,
    under the version that is its number. It ends with "abort" but for the last, or where the limit is reached."""

    def __init__(self, *cuts, kept=False):
        self.cuts, self.requests, self.next, self.kept = list(cuts), [], 100, kept

    async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=None):
        self.requests.append((token_ids.tolist(), sampling.max_new_tokens, routes_from, group))
        count, version = self.cuts.pop(0), len(self.requests)
        ids = np.arange(self.next, self.next + count, dtype=np.int32)
        self.next += count
        whole = np.concatenate([token_ids, ids])[:-1] if count else token_ids[:routes_from]
        rows = np.stack([whole, np.arange(len(whole))], -1)[routes_from:, None].astype(np.int16)
        return Sampled(
            ids=ids,
            logprobs=np.full(count, -float(version), np.float32),
            routes=rows,
            weight_versions=np.full(count, version, np.int32),
            finish_reason="abort" if self.cuts and self.cuts[0] is not None else "stop",
            kept=ids[:, None] if self.kept else None,
            mixed_kv=np.full(count, True) if version == 2 else None,
        )


def session_after(engine, turns=((STOP, ()),), prompt=(1, 2, 3), **settings):
    session = Session(engine, np.array(prompt, np.int32), **settings)

    async def run():
        for sampling, observation in turns:
            await session.sample(sampling)
            session.append(np.array(observation, np.int32))

    asyncio.run(run())
    return session


def every_route_names_its_token_and_place(rollout):
    ids = rollout.token_ids[:-1]
    return (rollout.routes[:, 0] == np.stack([ids, np.arange(len(ids))], -1)).all()


def test_an_answer_goes_on_by_itself_after_interruptions_and_keeps_what_is_there():
    engine = Engine(2, 3, 1)
    session = session_after(engine, group=7)
    rollout = session.rollout
    assert rollout.response_ids.tolist() == [100, 101, 102, 103, 104, 105]
    assert rollout.weight_versions.tolist() == [1, 1, 2, 2, 2, 3]
    assert rollout.rollout_logprobs.tolist() == [-1, -1, -2, -2, -2, -3]
    assert rollout.mixed_kv.tolist() == [False, False, True, True, True, False]
    assert rollout.finish_reason == "stop"
    assert every_route_names_its_token_and_place(rollout)
    assert session.interruptions == 2
    assert session.oldest_version == 1
    # each request is what stands there, with what is left of the limit; routes from the last token that has none
    assert engine.requests == [
        ([1, 2, 3], 10, 0, 7),
        ([1, 2, 3, 100, 101], 8, 4, 7),
        ([1, 2, 3, 100, 101, 102, 103, 104], 5, 7, 7),
    ]


def test_an_interruption_before_the_first_token_changes_nothing():
    engine = Engine(0, 0, 2)
    session = session_after(engine)
    assert session.rollout.response_ids.tolist() == [100, 101]
    assert [request[0] for request in engine.requests] == [[1, 2, 3]] * 3


def test_an_answer_that_is_cut_at_its_limit_has_ended():
    session = session_after(Engine(4, 6, 99))
    assert len(session.rollout) == 10
    assert session.rollout.finish_reason == "length"


def test_turns_append_what_the_policy_did_not_sample_and_ask_for_its_routes_with_the_next_answer():
    engine = Engine(2, None)
    engine.cuts = [2, None]
    session = Session(engine, np.array([1, 2, 3], np.int32))

    async def run():
        await session.sample(STOP)
        session.append([50, 51])
        assert session.token_ids.tolist() == [1, 2, 3, 100, 101, 50, 51]
        assert len(session.rollout) == 2
        engine.cuts = [1, 2]  # interrupted once
        await session.sample(STOP)

    asyncio.run(run())
    rollout = session.rollout
    assert rollout.prompt_ids.tolist() == [1, 2, 3]
    assert rollout.response_ids.tolist() == [100, 101, 50, 51, 102, 103, 104]
    assert rollout.trained.tolist() == [True, True, False, False, True, True, True]
    assert rollout.weight_versions.tolist() == [1, 1, -1, -1, 2, 3, 3]
    assert rollout.rollout_logprobs.tolist() == [-1, -1, 0, 0, -2, -3, -3]
    assert rollout.mixed_kv.tolist() == [False] * 4 + [True, False, False]
    assert every_route_names_its_token_and_place(rollout)
    assert [(limit, start) for _, limit, start, _ in engine.requests] == [(10, 0), (10, 4), (9, 7)]


def test_tokens_that_were_not_sampled_have_no_kept_set():
    engine = Engine(2, None, kept=True)
    session = Session(engine, np.array([1], np.int32))

    async def run():
        await session.sample(STOP)
        session.append([50])
        engine.cuts = [1]
        await session.sample(STOP)

    asyncio.run(run())
    assert session.rollout.kept.tolist() == [[100], [101], [-1], [102]]


def test_what_is_appended_before_the_first_sample_belongs_to_the_prompt():
    session = Session(Engine(1), np.array([1], np.int32))
    session.append([2, 3])
    rollout = asyncio.run(session.sample(STOP))
    assert rollout.prompt_ids.tolist() == [1, 2, 3]
    assert rollout.response_ids.tolist() == [100]


def test_what_was_appended_stays_when_the_request_after_it_is_interrupted_before_its_first_token():
    engine = Engine(2, None)
    session = Session(engine, np.array([1, 2, 3], np.int32))

    async def run():
        await session.sample(STOP)
        session.append([50])
        engine.cuts = [0, 1]
        await session.sample(STOP)

    asyncio.run(run())
    assert session.rollout.response_ids.tolist() == [100, 101, 50, 102]
    assert every_route_names_its_token_and_place(session.rollout)


def test_a_session_can_go_on_with_a_rollout_of_before():
    begun = session_after(Engine(3)).rollout
    engine = Engine(2)
    engine.next = 103
    whole = session_after(engine, rollout=begun).rollout
    assert (whole.response_ids[:3] == begun.response_ids).all()
    assert engine.requests[0][2] == 5
    assert every_route_names_its_token_and_place(whole)


def test_a_session_has_moved_when_tokens_of_it_came():
    class Telling(Engine):
        async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=None):
            await asyncio.sleep(0.02)
            on_tokens(Piece(len(token_ids), (7,), (-1.0,)))
            return await super().sample(token_ids, sampling, routes_from=routes_from)

    begun = time.monotonic()
    session = session_after(Telling(2, None))
    assert begun + 0.02 <= session.moved <= time.monotonic()


def test_rows_that_do_not_belong_to_the_tokens_are_an_error():
    class Overwriting(Engine):
        async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=None):
            return await super().sample(token_ids, sampling, routes_from=0)  # all rows again

    with pytest.raises(AnswerError, match="brings as many route rows"):
        session_after(Overwriting(2, 2))
