"""A lost server is started again: whatever goes wrong there, nobody waits for it for ever."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest

from pipeline.engine import membership
from pipeline.engine.fleet import ServerState
from tests.support.fake_servers import SAMPLING, Server, Trainers, fleet_of, until, wait_for


def raising(server, *errors):
    """Restarts of this server that fail so, one after another."""
    left, restart = list(errors), server.restart

    def fail_or_restart():
        if left:
            raise left.pop(0)
        restart()

    server.restart = fail_or_restart


def test_a_server_that_the_system_does_not_let_start_is_started_again():
    async def run():
        a = Server("a")
        raising(a, OSError(12, "Cannot allocate memory"), TimeoutError())
        fleet = fleet_of(a, max_restarts=9)
        a.living = False
        async with fleet:
            fleet.check_alive()
            await until(lambda: fleet.servers[0].state is ServerState.SERVING)
        assert (fleet.members.lost, fleet.members.failure) == (3, None)

    asyncio.run(run())


def test_whatever_goes_wrong_as_a_server_is_started_again_ends_the_run_and_nobody_waits_for_it():
    async def run():
        a = Server("a")
        raising(a, KeyError("a mistake"))
        fleet = fleet_of(a)
        a.living = False
        async with fleet:
            with contextlib.suppress(KeyError):  # known already
                fleet.check_alive()
            with pytest.raises(KeyError, match="a mistake"):
                await asyncio.wait_for(fleet.sample([1], SAMPLING), 10)
            with pytest.raises(KeyError, match="a mistake"):
                fleet.transfer(Trainers())

    asyncio.run(run())


def test_a_server_is_waited_for_whose_next_start_begins_before_the_thread_of_the_last_has_ended(monkeypatch):
    a, threads = Server("a"), []

    class Overtaken(threading.Thread):
        """Returns from its start when it has got as far as the server's."""

        def start(self):
            threads.append(self)
            before = a.starts
            super().start()
            wait_for(lambda: a.starts > before)

    fleet = fleet_of(a)
    monkeypatch.setattr(membership, "threading", SimpleNamespace(Thread=Overtaken))
    a.failures, a.living = 1, False
    a.loading.clear()
    fleet.check_alive()
    threads[0].join(10)
    assert (a.starts, fleet.servers[0].state) == (3, ServerState.STARTING)
    assert fleet.members._coming == {fleet.servers[0]}
    a.loading.set()
    fleet.transfer(trainers := Trainers())
    assert trainers.sent == [(1, ["http://a"], True)]
    fleet.close()


def test_a_server_that_is_taken_out_while_no_node_has_room_for_it_does_not_come_back(monkeypatch):
    monkeypatch.setattr("pipeline.engine.membership._LOOK_S", 0.01)
    others = threading.enumerate()
    a, b = Server("a"), Server("b")
    fleet = fleet_of(a, b)
    b.nodeless, b.living = True, False
    fleet.check_alive()
    wait_for(lambda: b.starts > 3)
    fleet.members.leave(fleet.servers[1])
    b.nodeless = False
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "sameroute restart" and t not in others])
    assert [server.state for server in fleet.servers] == [ServerState.SERVING, ServerState.LEFT]
    fleet.close()
