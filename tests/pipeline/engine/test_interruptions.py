"""Answers that live through three changes of weights, on real servers with overlap schedule and prefix cache."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools

import numpy as np
import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine import client as client_module
from pipeline.engine.fleet import Fleet, FleetServer
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.rollout.session import Session
from tests.conftest import client_of
from tests.support.two_weights import Alternating, expected, must_equal

RUNNING, QUEUED = 3, 2
LONG = Sampling(360, 1.0, ignore_eos=True)


@contextlib.contextmanager
def fleet_of(folders, folder, **settings):
    config = ServerConfig(
        context_length=1024,
        max_running_requests=RUNNING,
        prefix_cache=True,
        overlap_schedule=True,
        startup_timeout_s=240,
        **settings,
    )
    with SGLangServer(config, folders[0], folder / "log", device="cpu", seed=0, return_routed_experts=True) as server:
        client = client_of(server, timeout_s=60)
        fleet = Fleet([FleetServer(server, client)], config)
        fleet.wait_ready()
        yield fleet, Alternating(folders)


@pytest.fixture(scope="module")
def one(preloaded, folders, tmp_path_factory):
    with fleet_of(folders, tmp_path_factory.mktemp("one")) as running:
        yield running


async def tokens_more(fleet, count):
    """Wait until the server has sampled so many tokens more of the requests that it runs."""
    first = None
    while True:
        (load,) = await fleet.servers[0].client.current_loads()
        if load["num_running_reqs"] == RUNNING:
            first = load["num_used_tokens"] if first is None else first
            if load["num_used_tokens"] >= first + count * RUNNING:
                return
        await asyncio.sleep(0.005)


async def interrupted_three_times(fleet, trainers, mode, prompt):
    queued = QUEUED if mode == "in_place" else 0  # after the others, all take turns
    sessions = [Session(fleet, prompt, group=1) for _ in range(RUNNING + queued)]
    async with fleet:
        tasks = [asyncio.create_task(session.sample(LONG)) for session in sessions]
        for _ in range(3):
            await tokens_more(fleet, 20)
            async with fleet.interrupted(mode):
                await asyncio.to_thread(fleet.transfer, trainers)
        rollouts = await asyncio.gather(*tasks)
        for session in sessions:  # another turn, over what the cache has of the last version
            session.append([7, 8, 9])
        turns = await asyncio.gather(*(session.sample(Sampling(8, 1.0, ignore_eos=True)) for session in sessions))
    return sessions, rollouts, turns


def run(fleet_and_trainers, mode, seed):
    fleet, trainers = fleet_and_trainers
    prompt = np.random.default_rng(seed).integers(0, 500, 40)
    before = fleet.version
    sessions, rollouts, turns = asyncio.run(interrupted_three_times(fleet, trainers, mode, prompt))
    spans = [len(np.unique(rollout.weight_versions)) for rollout in rollouts]
    assert max(spans) == 4, spans
    assert all(len(rollout) == LONG.max_new_tokens for rollout in rollouts)
    assert all((np.diff(rollout.weight_versions) >= 0).all() for rollout in rollouts)
    assert max(rollout.weight_versions.max() for rollout in rollouts) == before + 3 == fleet.version
    assert min(session.oldest_version for session in sessions) == before
    return sessions, rollouts, turns


@pytest.fixture(scope="module")
def interrupted(one):
    """mode -> what `run` says of it."""
    return functools.cache(lambda mode: run(one, mode, seed=0))


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_every_token_is_that_of_a_whole_pass_under_its_version(interrupted, models, mode):
    _, rollouts, turns = interrupted(mode)
    for rollout in (*rollouts, *turns):
        assert rollout.mixed_kv is None
        must_equal(models, rollout)
    assert sum(rollout.retractions for rollout in rollouts) >= (RUNNING * 3 if mode == "retract" else 0)


def test_in_place_reads_over_the_old_keys_and_values_and_says_so(one, models):
    _, rollouts, turns = run(one, "in_place", seed=1)
    for rollout, turn in zip(rollouts, turns, strict=True):
        must_equal(models, rollout, over_old_kv=True)
        begun = rollout.weight_versions == rollout.weight_versions[0]
        mixed = np.zeros(len(rollout), bool) if rollout.mixed_kv is None else rollout.mixed_kv
        assert (mixed == ~begun).all()
        must_equal(models, turn, last=8)  # read whole, under the last weights
    assert sum(rollout.mixed_kv is not None for rollout in rollouts) >= RUNNING
    one_version = [rollout for rollout in rollouts if rollout.mixed_kv is None]  # they waited in the queue meanwhile
    assert one_version
    for rollout in one_version:
        must_equal(models, rollout)


def test_drain_waits_for_what_runs(one, models):
    fleet, trainers = one

    async def drained():
        async with fleet:
            tasks = [asyncio.create_task(Session(fleet, [4, 5, 6]).sample(LONG)) for _ in range(RUNNING)]
            await tokens_more(fleet, 5)
            async with fleet.interrupted("drain"):
                assert not fleet.servers[0].in_flight
                waiting = asyncio.create_task(Session(fleet, [4, 5, 6]).sample(Sampling(4, 1.0, ignore_eos=True)))
                await asyncio.to_thread(fleet.transfer, trainers)
                assert not waiting.done()
            return await asyncio.gather(*tasks, waiting)

    before = fleet.version
    *old, new = asyncio.run(drained())
    assert all((rollout.weight_versions == before).all() for rollout in old)
    assert (new.weight_versions == before + 1).all()
    must_equal(models, new)


def test_what_this_file_looks_for_would_be_seen(interrupted, models):
    """Versions off by one token, routes of the last weights over older ones, and answers over old keys and values."""
    _, rollouts, _ = interrupted("abort")
    rollout = max(rollouts, key=lambda r: len(np.unique(r.weight_versions)))
    must_equal(models, rollout)
    early, late = (np.roll(rollout.weight_versions, by) for by in (-1, 1))
    early[-1], late[0] = rollout.weight_versions[-1], rollout.weight_versions[0]
    for versions in (early, late, rollout.weight_versions + 1):
        with pytest.raises(AssertionError, match="log-probs differ"):
            must_equal(models, dataclasses.replace(rollout, weight_versions=versions))
    last = dataclasses.replace(
        rollout, weight_versions=np.full_like(rollout.weight_versions, rollout.weight_versions[-1])
    )
    overwritten = expected(models, last, over_old_kv=False)[1].astype(np.uint8)
    with pytest.raises(AssertionError, match="routes differ"):
        must_equal(models, dataclasses.replace(rollout, routes=overwritten))
    with pytest.raises(AssertionError, match="log-probs differ"):
        must_equal(models, rollout, over_old_kv=True)


@pytest.mark.parametrize("keyed", [True, False])
def test_only_the_key_keeps_new_answers_from_old_prefixes(one, models, monkeypatch, keyed):
    fleet, trainers = one
    if not keyed:
        monkeypatch.setattr(client_module, "cache_key", lambda version: "all alike")
    prompt = np.random.default_rng(3).integers(0, 500, 60)

    async def before_and_after():
        async with fleet:
            await Session(fleet, prompt).sample(Sampling(4, 1.0, ignore_eos=True))
            async with fleet.interrupted("in_place"):
                await asyncio.to_thread(fleet.transfer, trainers)
            return await Session(fleet, prompt).sample(Sampling(16, 1.0, ignore_eos=True))

    rollout = asyncio.run(before_and_after())
    assert (rollout.weight_versions == fleet.version).all()
    with contextlib.nullcontext() if keyed else pytest.raises(AssertionError, match="differ"):
        must_equal(models, rollout)


@pytest.mark.proof
def test_a_server_of_two_ranks_is_interrupted_as_one_is(preloaded, folders, models, tmp_path):
    with fleet_of(folders, tmp_path, tensor_parallel=2) as two:
        for mode in ("abort", "retract", "in_place"):
            for rollout in run(two, mode, seed=4)[1]:
                must_equal(models, rollout, over_old_kv=mode == "in_place")


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_an_answer_that_ends_as_it_is_interrupted_has_ended_and_is_not_gone_on_with(one, mode):
    """Of the tokens that are in flight when an interruption comes, one of eight ends its answer."""
    fleet, _ = one
    stops = tuple(range(0, 512, 8))
    interruptions, sessions = [], []

    def enough():
        cut = sum(session.interruptions for session in sessions) if mode == "abort" else len(interruptions)
        return cut >= 20

    async def interrupted_all_the_time():
        async with fleet:
            while not enough():
                more = [Session(fleet, [5, 6, 7], group=1) for _ in range(20)]
                sessions.extend(more)
                answers = asyncio.gather(*(session.sample(Sampling(64, 1.0, stop_token_ids=stops)) for session in more))
                while not answers.done():
                    async with fleet.interrupted(mode):
                        interruptions.append(mode)
                    await asyncio.wait([answers], timeout=0.02)
                await answers

    asyncio.run(interrupted_all_the_time())
    for session in sessions:
        rollout = session.rollout
        ends = np.isin(rollout.token_ids[3:], stops)
        assert not ends[:-1].any(), rollout.token_ids
        assert (rollout.finish_reason, len(rollout.token_ids) - 3) == ("stop", ends.argmax() + 1) or not ends.any()
