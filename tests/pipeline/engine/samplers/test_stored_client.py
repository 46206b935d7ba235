"""Answers through a sampler process are those of the client in this process; what is given up or dies there is known
here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray

from pipeline.cluster.ray_session import ray_session
from pipeline.config.run import ClusterConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.control import UnreachableError
from pipeline.engine.decoder import AnswerError
from pipeline.engine.fleet import Fleet, FleetServer
from pipeline.engine.samplers.stored_client import through_samplers
from pipeline.engine.sampling import Sampling
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.rollout.session import Session
from pipeline.stored import StoredRoutes
from pipeline.types import Prompt, Rollout
from scripts.simulated_servers import Shape, simulated_servers
from tests.conftest import client_of
from tests.support.sampling import sampling_begins

SHAPE = Shape(num_layers=6, topk=4, num_experts=32, vocab_size=1000)
SAMPLING = Sampling(max_new_tokens=700, temperature=1.0)
ARRAYS = ("response_ids", "rollout_logprobs", "routes", "weight_versions")


class Started:
    """A ServerProcess that somebody else started."""

    log_path, keys = None, None

    def __init__(self, url):
        self.url = url

    def wait_ready(self, timeout_s=None):
        pass

    def alive(self):
        return True

    def send_weights(self, *_, **__):
        pass


@pytest.fixture(scope="module")
def ray_up():
    with ray_session(ClusterConfig(object_store_gb=0.1), cpus=1):
        yield


@pytest.fixture(scope="module")
def urls():
    with simulated_servers(2, SHAPE) as urls:
        yield urls


def own_client(url, num_experts=SHAPE.num_experts):
    sizes = {"num_layers": SHAPE.num_layers, "topk": SHAPE.topk, "num_experts": num_experts}
    return SGLangClient(url, vocab_size=SHAPE.vocab_size, **sizes)


def fleet_of(clients):
    fleet = Fleet([FleetServer(Started(client.url), client) for client in clients])
    fleet.wait_ready()
    fleet.transfer(Started(""))
    return fleet


def prompts(count):
    rng = np.random.default_rng(0)
    return [Prompt(rng.integers(0, 500, 9, np.int32), "", index=i) for i in range(count)]


def sampled(clients):
    groups = sample_groups_sync(fleet_of(clients), prompts(3), 2, SAMPLING)
    return [rollout for group in groups for rollout in group.rollouts]


def equal(one: Rollout, other: Rollout) -> bool:
    return all(np.array_equal(np.asarray(getattr(one, name)), np.asarray(getattr(other, name))) for name in ARRAYS)


def process_of(client) -> int:
    """The process ID of its sampler process."""
    return ray.get(client.sampler._actor.__ray_call__.remote(lambda _: os.getpid()))


def test_two_samplers_of_two_servers_bring_what_the_client_brings_and_keep_the_routes(ray_up, urls):
    expected = sampled([own_client(url) for url in urls])
    with through_samplers([own_client(url) for url in urls], 2, [None, None]) as clients:
        found = sampled(clients)
        assert len({client.sampler for client in clients}) == 2
        assert all(isinstance(rollout.routes, StoredRoutes) for rollout in found)
        assert len(found) == len(expected) == 6
        assert all(map(equal, found, expected))


def test_routes_of_an_answer_that_went_on_are_those_of_all_its_requests(ray_up, urls):
    async def twice(client):
        async with client:
            session = Session(client, prompts(1)[0].ids)
            await session.sample(SAMPLING)
            session.append([1, 2, 3])
            return await session.sample(replace(SAMPLING, max_new_tokens=5))

    client = own_client(urls[0])
    client.version = 1
    with through_samplers([client], 1, [None]) as (far,):
        far.version = 1
        expected, found = asyncio.run(twice(client)), asyncio.run(twice(far))
        assert len(found.routes.parts) == 2
        assert found.routes.shape == expected.routes.shape
        assert equal(found, expected)


def test_each_token_is_heard_of_once_also_those_that_come_with_the_end(ray_up, urls):
    async def heard(client):
        async with client:
            pieces, session = [], Session(client, prompts(1)[0].ids)
            rollout = await session.sample(replace(SAMPLING, max_new_tokens=60, each_token=True), pieces.append)
            return pieces, rollout

    with through_samplers([own_client(urls[0])], 1, [None]) as (client,):
        pieces, rollout = asyncio.run(heard(client))
    assert [token for piece in pieces for token in piece.ids] == rollout.response_ids.tolist()
    assert [value for piece in pieces for value in piece.logprobs] == pytest.approx(rollout.rollout_logprobs.tolist())
    assert pieces[0].at == 9


def test_a_bad_answer_is_the_same_error(ray_up, urls):
    wrong = own_client(urls[0], num_experts=20)
    with pytest.raises(AnswerError) as expected:
        sampled([wrong])
    with through_samplers([wrong], 1, [None]) as clients, pytest.raises(AnswerError) as found:
        sampled(clients)
    assert type(found.value) is AnswerError
    assert str(found.value) == str(expected.value)


def test_what_a_killed_sampler_had_in_hand_is_sampled_again_and_what_it_had_brought_stays(ray_up, server, capfd):
    sampling = Sampling(300, 1.0, ignore_eos=True)

    async def run(fleet, process):
        async with fleet:
            before = await Session(fleet, prompts(1)[0].ids).sample(replace(sampling, max_new_tokens=4))
            task = asyncio.create_task(Session(fleet, prompts(1)[0].ids).sample(sampling))
            await sampling_begins(server)
            os.kill(process, signal.SIGKILL)
            return before, await task

    with through_samplers([client_of(server, timeout_s=120)], 1, [None]) as (client,):
        fleet = Fleet([FleetServer(server, client)])
        fleet.wait_ready()
        before, after = asyncio.run(run(fleet, process_of(client)))
        assert len(after) == 300
        assert fleet.sent_again == 1
        assert np.asarray(before.routes).shape == before.routes.shape
    assert "a sampler process died" in capfd.readouterr().err


def test_a_sampler_that_stands_still_is_ended_and_another_takes_its_place(ray_up, urls, monkeypatch):
    monkeypatch.setattr("pipeline.engine.samplers.stored_client._HANGS_S", 0.5)

    async def twice(client):
        async with client:
            with pytest.raises(UnreachableError, match=r"the sampler process of .* died"):
                await client.sample(prompts(1)[0].ids, SAMPLING)
            monkeypatch.undo()  # the next one takes longer to start
            return await client.sample(prompts(1)[0].ids, SAMPLING)

    with through_samplers([own_client(urls[0])], 1, [None]) as (client,):
        stopped = process_of(client)
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert len(asyncio.run(asyncio.wait_for(twice(client), 60)).ids)
        finally:
            with contextlib.suppress(ProcessLookupError):  # here it is no child of the raylet, which would end it
                os.kill(stopped, signal.SIGKILL)


def test_a_call_that_is_given_up_ends_on_the_server_and_progress_is_heard_before(ray_up, server):
    heard = []

    async def run(client):
        async with client:
            ids, sampling = prompts(1)[0].ids, Sampling(900, 1.0, ignore_eos=True, each_token=True)
            task = asyncio.create_task(client.sample(ids, sampling, on_tokens=heard.append))
            await sampling_begins(server)
            while not heard:
                assert not task.done()
                await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while any(load["num_running_reqs"] for load in await client.current_loads()):
                await asyncio.sleep(0.05)

    with through_samplers([client_of(server, timeout_s=120)], 1, [None]) as (client,):
        asyncio.run(asyncio.wait_for(run(client), 60))
    places = [piece.at + i for piece in heard for i in range(len(piece.ids))]  # on a busy machine two come at once
    assert places == list(range(9, 9 + len(places)))  # none is left out, none comes twice


def test_nothing_is_left_of_a_sampler_when_its_block_ends(ray_up, urls):
    with through_samplers([own_client(urls[0])], 1, [None]) as clients:
        sampled(clients)
        process = process_of(clients[0])
        assert psutil.pid_exists(process)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process):
        assert time.monotonic() < deadline, "a sampler process is left"
        time.sleep(0.05)
