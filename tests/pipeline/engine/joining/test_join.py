"""Servers join a fleet and leave it while answers are open; none is lost, and transfers know who is there."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from pipeline.engine.fleet import ServerState
from pipeline.engine.joining import join as join_module
from pipeline.engine.joining.join import MembershipError, join, leave
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from pipeline.rollout.session import Session
from pipeline.types import Sampled
from tests.support.fake_servers import Member, Server, Trainers, fleet_of, load, until, wait_for

SAMPLING = Sampling(4, 1.0)


class Growing(Server):
    """Samples its own letter until it has four tokens, or is aborted; hangs where it is `hung`."""

    hung = False

    async def sample(self, ids, sampling, *, routes_from=0, on_tokens=None):
        assert self.open > 0
        self.asked.append((len(ids), self.version))
        tokens = [ord(self.name)]
        await self.release.wait()
        reason = "abort" if "/abort_request" in self.steered else "stop"
        tokens *= 1 if reason == "abort" else sampling.max_new_tokens
        count = len(tokens)
        logprobs, versions = np.full(count, -1.0, np.float32), np.full(count, self.version, np.int32)
        return Sampled(np.array(tokens, np.int32), logprobs, None, versions, reason)

    async def ask(self, method, path, body=None):
        if self.hung:
            raise ServerError("it does not answer")
        return await super().ask(method, path, body)

    async def current_loads(self, timeout_s=None):
        return [load()]


def answer(fleet, group):
    return asyncio.create_task(Session(fleet, [7], group=group).sample(SAMPLING))


def test_open_answers_of_a_server_that_leaves_go_on_at_another_with_what_they_had():
    async def run():
        a, b = Growing("a"), Growing("b")
        fleet, trainers = fleet_of(a, b), Trainers()
        async with fleet:
            tasks = [answer(fleet, group) for group in "xy"]
            await until(lambda: len(a.asked) == len(b.asked) == 1)
            await leave(fleet, fleet.servers[0])
            assert [server.state for server in fleet.servers] == [ServerState.LEFT, ServerState.SERVING]
            b.release.set()
            first, second = await asyncio.gather(*tasks)
            fleet.transfer(trainers)
            await answer(fleet, "x")
        assert first.response_ids.tolist() == [ord("a"), *[ord("b")] * 3]
        assert first.servers == (0, 1)
        assert second.response_ids.tolist() == [ord("b")] * 4
        assert trainers.sent == [(1, ["http://b"], True)]
        assert len(a.asked) == 1
        assert (fleet.sent_again, fleet.members.restarted) == (0, 0)
        assert fleet.metrics()["servers/left"] == 1

    asyncio.run(asyncio.wait_for(run(), 10))


def test_answers_of_a_server_that_leaves_and_hangs_are_sampled_again():
    async def run():
        a, b = Growing("a"), Growing("b")
        fleet = fleet_of(a, b)
        async with fleet:
            tasks = [answer(fleet, group) for group in "xy"]
            await until(lambda: len(a.asked) == len(b.asked) == 1)
            a.hung = True
            await leave(fleet, fleet.servers[0])
            b.release.set()
            first, second = await asyncio.gather(*tasks)
        assert first.response_ids.tolist() == second.response_ids.tolist() == [ord("b")] * 4
        assert fleet.sent_again == 1
        assert fleet.members.lost == 0

    asyncio.run(asyncio.wait_for(run(), 10))


def test_one_whose_answers_do_not_end_in_time_leaves_all_the_same(monkeypatch):
    monkeypatch.setattr(join_module, "LEAVE_S", 0.05)

    async def run():
        a, b = Growing("a"), Growing("b")
        a.waiting = 1
        a.current_loads = lambda timeout_s=None: _busy()
        fleet = fleet_of(a, b)
        async with fleet:
            await leave(fleet, fleet.servers[0])
        assert fleet.servers[0].state is ServerState.LEFT

    async def _busy():
        return [load(running=1)]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_the_last_server_cannot_leave_and_goes_on():
    async def run():
        a, b = Growing("a"), Growing("b")
        fleet = fleet_of(a, b)
        async with fleet:
            await leave(fleet, fleet.servers[1])
            with pytest.raises(MembershipError, match="http://a is the last server that takes requests"):
                await leave(fleet, fleet.servers[0])
            a.release.set()
            assert len(await answer(fleet, "x")) == 4

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_server_that_joined_gets_requests_and_transfers_and_keeps_the_numbers_of_the_others():
    async def run():
        a, b, trainers = Growing("a"), Growing("b"), Trainers()
        fleet = fleet_of(a)
        fleet.transfer(trainers)
        async with fleet, fleet:
            await join(fleet, Member(b, b, added=True))
            tasks = [answer(fleet, group) for group in "xy"]
            await until(lambda: len(a.asked) == len(b.asked) == 1)
            a.release.set()
            b.release.set()
            found = await asyncio.gather(*tasks)
            fleet.transfer(trainers)
        assert b.asked == [(1, 1)]
        assert sorted(rollout.servers for rollout in found) == [(0,), (1,)]
        assert [urls for _, urls, _ in trainers.sent] == [["http://a"], ["http://a", "http://b"]]
        assert a.open == b.open == 0
        assert fleet.metrics()["servers/joined"] == 1

    asyncio.run(asyncio.wait_for(run(), 10))


def test_one_that_joins_between_two_synchronous_steps_is_entered_with_the_others():
    async def run(fleet):
        async with fleet:
            return await asyncio.gather(*(answer(fleet, group) for group in "xy"))

    a, b = Growing("a"), Growing("b")
    fleet = fleet_of(a)
    asyncio.run(join(fleet, Member(b, b, added=True)))
    for server in (a, b):
        server.release.set()
    assert sorted(rollout.servers for rollout in asyncio.run(run(fleet))) == [(0,), (1,)]


def test_an_added_server_that_is_lost_has_left_and_costs_no_restart_nor_an_answer():
    async def run():
        a, b = Growing("a"), Growing("b")
        fleet, said = fleet_of(a, max_restarts=0), []
        fleet.members.say = said.append
        async with fleet:
            await join(fleet, Member(b, b, added=True))
            tasks = [answer(fleet, group) for group in "xy"]
            await until(lambda: len(a.asked) == len(b.asked) == 1)
            fleet.members.lose(fleet.servers[1], "does not answer")
            a.release.set()
            found = await asyncio.gather(*tasks)
        assert all(rollout.response_ids.tolist() == [ord("a")] * 4 for rollout in found)
        assert fleet.servers[1].state is ServerState.LEFT
        assert (fleet.members.failure, b.starts) == (None, 1)
        assert said == ["the run goes on without the added server http://b, which does not answer"]
        fleet.check_alive()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_one_of_the_runs_own_that_left_is_started_again_and_waits_for_the_current_weights():
    a, b = Growing("a"), Growing("b")
    fleet, trainers = fleet_of(a, b), Trainers()
    asyncio.run(leave(fleet, fleet.servers[0]))
    b_only = [server.process.url for server in fleet.members.reconcile()]
    fleet.members.bring_back(fleet.servers[0])
    wait_for(lambda: fleet.servers[0].state is ServerState.PENDING_WEIGHTS)
    fleet.transfer(trainers)
    assert b_only == ["http://b"]
    assert a.starts == 2
    assert trainers.sent == [(1, ["http://a", "http://b"], True)]
    assert [server.state for server in fleet.servers] == [ServerState.SERVING] * 2
