"""Two real servers, of which one dies or hangs: every answer ends once, and the server comes back with the weights."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import psutil
import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine.fleet import Fleet, FleetServer, ServerState
from pipeline.engine.processes import processes_of
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.rollout.session import Session
from tests.conftest import client_of
from tests.support.sampling import sampling_begins
from tests.support.two_weights import Alternating, must_equal

pytestmark = pytest.mark.slow
SAMPLES = 8
CONFIG = ServerConfig(
    context_length=1024,
    startup_timeout_s=240,
    probe_timeout_s=3,
    max_restarts=9,
    prefix_cache=True,
    overlap_schedule=True,
)


@pytest.fixture(scope="module")
def two(preloaded, folders, tmp_path_factory):
    """A fleet of two servers whose weights are no longer those that they start with, and its trainer."""
    folder = tmp_path_factory.mktemp("two")
    started = [
        SGLangServer(CONFIG, folders[0], folder / f"{i}.log", device="cpu", seed=i, return_routed_experts=True)
        for i in range(2)
    ]
    try:
        for server in started:
            server.start()
        clients = [client_of(server, timeout_s=60) for server in started]
        fleet = Fleet([FleetServer(s, c) for s, c in zip(started, clients, strict=True)], CONFIG)
        fleet.wait_ready()
        trainers = Alternating(folders, timeout_s=4)
        fleet.transfer(trainers)
        yield fleet, trainers
        fleet.close()
    finally:
        for server in started:
            server.stop()


def send(server, number):
    for process in processes_of(server.process._token):
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


async def answers_while(fleet, act):
    """Answers of two groups, one a server; `act` in the middle of them, with the second server."""
    prompt = np.random.default_rng(0).integers(0, 500, 12)
    sessions = [Session(fleet, prompt, group=number % 2) for number in range(SAMPLES)]
    async with fleet:
        tasks = [asyncio.create_task(s.sample(Sampling(300, 1.0, ignore_eos=True))) for s in sessions]
        victim = fleet.servers[1]
        while victim.in_flight < SAMPLES // 2:
            await asyncio.sleep(0)
        await sampling_begins(victim.process)
        await act(victim)
        rollouts = await asyncio.wait_for(asyncio.gather(*tasks), 120)
        async with asyncio.timeout(120):
            while any(server.state is not ServerState.SERVING for server in fleet.servers):
                await asyncio.sleep(0.05)
        # The one that came back holds the current weights: it is asked alone.
        fleet.servers[0].state = ServerState.PAUSED
        rollouts.append(await Session(fleet, prompt).sample(Sampling(16, 1.0, ignore_eos=True)))
        fleet.servers[0].state = ServerState.SERVING
    return rollouts


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.proof), signal.SIGSTOP])
def test_all_answers_end_once_when_a_server_ends_or_stops_in_the_middle(two, models, number):
    fleet, trainers = two
    before, again, token = fleet.members.restarted, fleet.sent_again, fleet.servers[1].process._token

    async def act(victim):
        send(victim, number)

    rollouts = asyncio.run(answers_while(fleet, act))
    assert len(rollouts) == SAMPLES + 1
    assert all(len(rollout) == 300 for rollout in rollouts[:-1])
    assert len({tuple(rollout.response_ids.tolist()) for rollout in rollouts}) == SAMPLES + 1
    for rollout in rollouts:
        assert (rollout.weight_versions == fleet.version).all()
        must_equal(models, rollout)
    assert fleet.sent_again - again == SAMPLES // 2
    assert fleet.members.restarted == before + 1
    assert trainers.sent[-1] == (fleet.version, (fleet.servers[1].process.url,))
    assert [p for p in processes_of(token) if p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_server_that_stops_between_two_buckets_does_not_hold_the_run_up(two, models):
    fleet, trainers = two
    victim = fleet.servers[1]

    async def act(_):
        async with fleet.interrupted("abort"):
            trainers.between_buckets = lambda: send(victim, signal.SIGSTOP)
            await asyncio.to_thread(fleet.transfer, trainers)

    before = fleet.version
    rollouts = asyncio.run(answers_while(fleet, act))
    assert all(len(rollout) == 300 for rollout in rollouts[:-1])
    for rollout in rollouts:
        assert set(rollout.weight_versions.tolist()) <= {before, before + 1}
        must_equal(models, rollout)
    assert (rollouts[-1].weight_versions == before + 1).all()
