"""Servers as one: who gets a group, which version they hold, and who is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.engine.control import ServerAddress
from pipeline.engine.fleet import Fleet, FleetServer, ServerState
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError


class Server:
    """Stands for a server's process and its client; answers wait until `release`."""

    def __init__(self, name):
        self.name, self.open, self.asked, self.release, self.version = name, 0, [], asyncio.Event(), 0
        self.url, self.log_path, self.living = f"http://{name}", Path(f"{name}.log"), True
        self.keys = ServerKeys(f"{name}-api", f"{name}-admin")

    def wait_ready(self):
        assert self.living

    def alive(self):
        return self.living

    def log_tail(self):
        return f"{self.log_path}:\nthe last words"

    async def __aenter__(self):
        self.open += 1
        return self

    async def __aexit__(self, *_):
        self.open -= 1

    async def sample(self, ids, sampling, *, routes_from=0):
        assert self.open > 0
        self.asked.append((ids[0], self.version))
        await self.release.wait()
        if ids == [13]:
            raise ServerError("unlucky")
        return f"{self.name}:{ids[0]}"

    async def score(self, ids):
        return self.name, ids


class Trainers:
    """Stands for the trainer ranks; keeps the versions that were sent."""

    def __init__(self):
        self.sent = []

    def send_weights(self, version):
        self.sent.append(version)
        if version == 13:
            raise ServerError("unlucky")


def fleet_of(*servers):
    fleet = Fleet([FleetServer(server, server) for server in servers])
    fleet.wait_ready()
    return fleet


def test_a_sample_goes_to_the_server_of_its_group_else_to_the_one_with_the_fewest_in_flight():
    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        async with fleet, fleet:
            groups = [*"xxxx", *"yy", *"zz", None, None]
            tasks = [asyncio.create_task(fleet.sample([i], None, group=g)) for i, g in enumerate(groups)]
            await asyncio.sleep(0)
            assert [i for i, _ in a.asked] == [0, 1, 2, 3, 8]
            assert [i for i, _ in b.asked] == [4, 5, 6, 7, 9]
            b.release.set()
            await asyncio.gather(*tasks[4:8], tasks[9])
            assert await fleet.score([5]) == ("b", [5])
            a.release.set()
            assert await tasks[0] == "a:0"
            await asyncio.gather(*tasks)
            assert all(not server.groups for server in fleet.servers)
        assert a.open == b.open == 0

    asyncio.run(run())


def test_a_failed_sample_is_no_longer_in_flight():
    async def run():
        a, b = Server("a"), Server("b")
        a.release.set()
        b.release.set()
        fleet = fleet_of(a, b)
        async with fleet:
            with pytest.raises(ServerError, match="unlucky"):
                await fleet.sample([13], None)
            await fleet.sample([1], None)
        assert [i for i, _ in a.asked] == [13, 1]
        assert b.asked == []

    asyncio.run(run())


def test_requests_carry_the_version_of_the_last_transfer():
    async def run():
        a = Server("a")
        a.release.set()
        fleet = fleet_of(a)
        async with fleet:
            await fleet.sample([1], None)
            fleet.transfer(Trainers())
            await fleet.sample([2], None)
        assert a.asked == [(1, 0), (2, 1)]

    asyncio.run(run())


def test_the_fleet_counts_its_transfers_and_a_failed_one_gives_its_number_to_no_other():
    fleet, trainers = fleet_of(Server("a")), Trainers()
    assert fleet.version == 0
    fleet.transfer(trainers)
    assert (fleet.version, trainers.sent) == (1, [1])
    fleet.begin_at(13)
    with pytest.raises(ServerError, match="unlucky"):
        fleet.transfer(trainers)
    fleet.transfer(trainers)
    assert (fleet.version, trainers.sent) == (14, [1, 13, 14])


def test_a_resumed_fleet_gets_the_version_that_it_had():
    fleet, trainers = fleet_of(Server("a")), Trainers()
    fleet.begin_at(7)
    fleet.transfer(trainers)
    assert (fleet.version, trainers.sent) == (7, [7])


def test_a_fleet_without_servers_counts_and_sends_nothing():
    fleet, trainers = Fleet(), Trainers()
    assert not fleet.serves
    fleet.adopt(5)
    fleet.transfer(trainers)
    assert (fleet.version, trainers.sent) == (6, [])
    with pytest.raises(ServerError, match="no server takes requests: there are none"):
        asyncio.run(fleet.score([1]))


def test_a_fleet_with_servers_adopts_no_version_that_they_do_not_hold():
    with pytest.raises(AssertionError, match="hold what was sent"):
        fleet_of(Server("a")).adopt(5)


def test_no_request_goes_to_a_server_before_it_is_ready_or_after_it_was_lost():
    async def run():
        a, b = Server("a"), Server("b")
        b.release.set()
        fleet = Fleet([FleetServer(a, a), FleetServer(b, b)])
        with pytest.raises(ServerError, match="no server takes requests: starting, starting"):
            await fleet.score([1])
        fleet.wait_ready()
        fleet.check_alive()
        a.living = False
        with pytest.raises(ServerError, match=r"died\na\.log:\nthe last words"):
            fleet.check_alive()
        assert [server.state for server in fleet.servers] == [ServerState.LOST, ServerState.SERVING]
        async with fleet:
            assert await fleet.sample([1], None, group=1) == "b:1"
            assert await fleet.sample([2], None) == "b:2"

    asyncio.run(run())


def test_addresses_are_in_the_order_of_the_servers():
    a, b = Server("a"), Server("b")
    assert fleet_of(a, b).addresses == [
        ServerAddress("http://a", Path("a.log"), a.keys),
        ServerAddress("http://b", Path("b.log"), b.keys),
    ]
