"""Which servers are up: who is lost, what brings it back, when a run is given up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

from pipeline import waiting
from pipeline.engine import membership
from pipeline.engine.fleet import ServerState
from pipeline.engine.membership import Membership
from pipeline.engine.server import NodeGoneError, ServerError
from pipeline.errors import SamerouteError
from tests.support.fake_servers import SAMPLING, Member, Server, Trainers, fleet_of, until, wait_for


def test_a_transfer_that_fails_loses_all_servers_in_it_and_is_made_again_with_those_that_come_back():
    a, b = Server("a"), Server("b")
    fleet, trainers = fleet_of(a, b), Trainers(1)
    b.loading.clear()
    fleet.transfer(trainers)
    assert (a.starts, b.starts) == (2, 2)
    assert trainers.sent == [(1, ["http://a", "http://b"], True), (1, ["http://a"], True)]
    assert [server.state for server in fleet.servers] == [ServerState.SERVING, ServerState.STARTING]
    assert (a.version, fleet.version) == (1, 1)
    b.loading.set()
    fleet.close()


def test_a_server_that_does_not_answer_is_no_part_of_a_transfer():
    a, b = Server("a"), Server("b")
    fleet, trainers = fleet_of(a, b), Trainers()
    b.living = False
    b.loading.clear()
    fleet.transfer(trainers)
    assert trainers.sent == [(1, ["http://a"], True)]
    b.loading.set()


def test_all_servers_are_asked_at_once_before_a_transfer(monkeypatch):
    together = threading.Barrier(3, timeout=60)
    monkeypatch.setattr(Member, "answers", lambda self, timeout_s: together.wait() >= 0)
    fleet, trainers = fleet_of(Server("a"), Server("b"), Server("c")), Trainers()
    fleet.transfer(trainers)
    assert trainers.sent == [(1, ["http://a", "http://b", "http://c"], True)]


def test_a_server_that_takes_long_to_answer_before_a_transfer_is_named_meanwhile(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_S", 0.02)
    said, a = [], Server("a")
    fleet = fleet_of(a)
    fleet.members = Membership(fleet.servers, fleet.config, said.append)
    monkeypatch.setattr(Member, "answers", lambda self, timeout_s: time.sleep(0.2) or True)
    fleet.transfer(Trainers())
    assert said[0] == "waiting for the server http://a (log: a.log) in the probe before a transfer, for 0 s"


def test_a_server_whose_process_lives_and_whose_scheduler_hangs_is_no_part_of_a_transfer():
    a, b = Server("a"), Server("b")
    fleet, trainers = fleet_of(a, b), Trainers()
    b.deaf = True
    b.loading.clear()
    fleet.transfer(trainers)
    assert trainers.sent == [(1, ["http://a"], True)]
    assert fleet.members.lost == 1
    b.loading.set()


def test_a_server_that_starts_while_a_run_is_resumed_waits_for_the_weights_of_that_run():
    fleet = fleet_of(Server("a"))
    fleet.begin_at(1)
    fleet.servers[0].state = ServerState.PENDING_WEIGHTS
    fleet.catch_up()
    assert fleet.servers[0].state is ServerState.PENDING_WEIGHTS


def test_a_server_that_does_not_take_the_weights_that_it_lacks_is_lost():
    a = Server("a")
    fleet, trainers = fleet_of(a), Trainers()
    fleet.transfer(trainers)
    fleet.servers[0].state = ServerState.PENDING_WEIGHTS
    trainers.bad, fleet.members.lost = [1], 0
    a.loading.clear()
    fleet.catch_up()
    assert fleet.members.lost == 1
    a.loading.set()


def test_the_restart_after_the_last_that_is_allowed_ends_the_run_with_the_log():
    async def run():
        a = Server("a")
        fleet = fleet_of(a, max_restarts=1)
        async with fleet:
            for _ in range(2):
                a.living = False
                with contextlib.suppress(ServerError):
                    fleet.check_alive()
                await until(lambda: fleet.members.failure or fleet.servers[0].state is ServerState.SERVING)
            for ask in (fleet.check_alive, lambda: fleet.transfer(Trainers())):
                with pytest.raises(ServerError, match=r"died; server\.max_restarts=1 in 3600 s(.|\n)*the last words"):
                    ask()
            with pytest.raises(ServerError, match="the last words"):
                await fleet.sample([1], SAMPLING)
        assert a.starts == 2

    asyncio.run(run())


def test_the_run_goes_on_without_servers_whose_node_is_gone_and_ends_with_the_last():
    def gone():
        raise NodeGoneError("node 2 is gone")

    async def run():
        a, b = Server("a"), Server("b")
        b.release.set()
        a.restart = b.restart = gone
        fleet = fleet_of(a, b)
        async with fleet:
            a.living = False
            fleet.members.check()
            assert fleet.servers[0].state is ServerState.LOST
            assert (await fleet.sample([1], SAMPLING)).server == 1
            fleet.transfer(trainers := Trainers())
            assert trainers.sent == [(1, ["http://b"], True)]
            b.living = False
            with contextlib.suppress(NodeGoneError):  # known already
                fleet.members.check()
            with pytest.raises(NodeGoneError, match="node 2 is gone"):
                await asyncio.wait_for(fleet.sample([1], SAMPLING), 10)

    asyncio.run(run())


def test_a_server_that_does_not_start_again_at_once_is_said_in_a_line_without_its_log():
    async def run():
        a, said = Server("a"), []
        fleet = fleet_of(a)
        fleet.members.say, a.failures, a.living = said.append, 1, False
        async with fleet:
            fleet.check_alive()
            await until(lambda: fleet.servers[0].state is ServerState.SERVING)
        assert a.starts == 3
        assert said[1] == (
            "the SGLang server did not start again: the SGLang server ended with code -9 while starting and is started "
            "again (log: a.log)"
        )

    asyncio.run(run())


def test_a_fleet_that_is_closed_starts_no_server_again():
    a = Server("a")
    fleet = fleet_of(a)
    fleet.close()
    a.living = False
    fleet.members.check()
    assert (a.starts, fleet.members.lost) == (1, 0)


def test_a_server_that_is_lost_while_it_stands_still_is_not_told_to_go_on():
    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        async with fleet, fleet.interrupted("in_place"):
            fleet.members.lose(fleet.servers[0], "died")
            assert [server.halted for server in fleet.servers] == [False, True]
        assert (a.steered, b.steered) == (["/pause_generation"], ["/pause_generation", "/continue_generation"])

    asyncio.run(run())


def test_a_server_whose_node_is_gone_leaves_and_joins_again_when_another_node_has_room(monkeypatch):
    monkeypatch.setattr("pipeline.engine.membership._LOOK_S", 0.01)

    async def run():
        a, b, said = Server("a"), Server("b"), []
        fleet, trainers = fleet_of(a, b), Trainers()
        fleet.transfer(trainers)
        fleet.members.say, b.nodeless, b.living = said.append, True, False
        async with fleet:
            fleet.check_alive()
            await until(lambda: b.starts > 3)
            a.release.set()
            await fleet.sample([1], SAMPLING)
            assert said[1:] == ["the run goes on without a server: the node of the server is gone"]
            b.url, b.nodeless = "http://elsewhere", False
            await until(lambda: fleet.servers[1].state is ServerState.SERVING)
            assert trainers.sent[1:] == [(1, ["http://elsewhere"], True)]
            assert fleet.members.lost == 1
        fleet.close()

    asyncio.run(run())


def test_a_trainer_that_dies_as_it_brings_a_server_up_to_date_ends_the_run():
    class Dying(Trainers):
        def send_again(self, version, servers):
            raise SamerouteError("trainer rank 0 died")

    async def run():
        a = Server("a")
        fleet = fleet_of(a)
        fleet.transfer(Dying())
        a.living = False
        async with fleet:
            fleet.check_alive()
            with pytest.raises(SamerouteError, match="trainer rank 0 died"):
                await asyncio.wait_for(fleet.sample([1], SAMPLING), 5)
            with pytest.raises(SamerouteError, match="trainer rank 0 died"):
                fleet.check_alive()

    asyncio.run(run())


def test_the_run_ends_where_the_nodes_of_all_servers_are_gone(monkeypatch):
    monkeypatch.setattr("pipeline.engine.membership._LOOK_S", 0.01)
    a = Server("a")
    fleet = fleet_of(a)
    a.nodeless, a.living = True, False
    with pytest.raises(NodeGoneError, match="the node of the server is gone"):
        fleet.transfer(Trainers())
    fleet.close()


def test_a_server_that_starts_again_already_is_not_lost_once_more_with_the_transfer_that_it_was_in():
    a, b = Server("a"), Server("b")
    fleet = fleet_of(a, b)

    class Failing(Trainers):
        def send_weights(self, version, servers, *, flush):
            if not self.sent:
                b.loading.clear()
                fleet.members.lose(fleet.servers[1], "died")
                wait_for(lambda: fleet.servers[1].state is ServerState.STARTING)
                self.bad = [version]
            super().send_weights(version, servers, flush=flush)

    fleet.transfer(Failing())
    b.loading.set()
    wait_for(lambda: fleet.servers[1].state is ServerState.PENDING_WEIGHTS)
    assert (a.starts, b.starts, fleet.members.lost) == (2, 2, 2)


def test_many_requests_of_one_death_count_as_one_loss():
    async def run():
        a, b = Server("a"), Server("bb")
        b.starts = 2
        a.release.set()
        b.release.set()
        fleet = fleet_of(a, b, max_restarts=1)
        a.loading.clear()
        async with fleet:
            parts = await asyncio.gather(*(fleet.sample([14], SAMPLING, group=1) for _ in range(20)))
            assert [part.ids.tolist() for part in parts] == [[14, 2]] * 20
            assert fleet.members.lost == 1
            a.loading.set()

    asyncio.run(run())


def test_a_server_that_comes_back_gets_the_weights_alone_before_it_gets_requests():
    async def run():
        a, b = Server("a"), Server("b")
        fleet, trainers = fleet_of(a, b), Trainers()
        fleet.transfer(trainers)
        trainers.current = False
        b.living = False
        async with fleet:
            fleet.check_alive()
            await until(lambda: fleet.servers[1].state is ServerState.PENDING_WEIGHTS)
            a.release.set()
            for number in range(4):
                await fleet.sample([number], SAMPLING)
            assert b.asked == []
            assert trainers.sent == [(1, ["http://a", "http://b"], True)]
            trainers.current = True
            await until(lambda: fleet.servers[1].state is ServerState.SERVING)
            assert trainers.sent[1:] == [(1, ["http://b"], True)]
            assert b.version == 1

    asyncio.run(run())


def test_a_server_that_hangs_when_it_is_to_stand_still_is_lost(monkeypatch):
    monkeypatch.setattr("pipeline.engine.fleet._PROBE_S", 0.01)

    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        a.ask = lambda *_: asyncio.sleep(1000)
        a.deaf = True
        a.loading.clear()
        async with fleet, asyncio.timeout(10), fleet.interrupted("in_place"):
            assert [fleet.members.lost, fleet.servers[1].state] == [1, ServerState.PAUSED]
            a.loading.set()

    asyncio.run(run())


def memory_of(monkeypatch, refuses=()):
    """What servers were asked of their memory; those that are named do not answer."""
    asked = []

    def ask(server, what):
        asked.append(f"{server.process.name} {what}")
        if asked[-1] in refuses:
            raise ServerError("unlucky")

    monkeypatch.setattr(Member, "control", lambda self, timeout_s: SimpleNamespace(
        release_memory=lambda: ask(self, "gives"), resume_memory=lambda part: ask(self, f"takes {part}"),
    ))  # fmt: skip
    return asked


def test_a_server_that_keeps_its_memory_is_ended_and_started_again_when_its_turn_comes(monkeypatch):
    asked = memory_of(monkeypatch, refuses=["b gives"])
    a, b = Server("a"), Server("b")
    fleet = fleet_of(a, b)
    fleet.release_memory()
    assert sorted(asked) == ["a gives", "b gives"]
    assert [server.released for server in fleet.servers] == [("weights", "cache"), ()]
    assert not b.living
    time.sleep(0.05)
    assert b.starts == 1  # the memory is the trainer's
    monkeypatch.setattr(membership, "_LOOK_S", 0.01)
    fleet.resume_memory("weights")
    assert fleet.servers[0].released == ("cache",)
    fleet.resume_memory("cache")
    assert asked[2:] == ["a takes weights", "a takes cache"]
    assert fleet.servers[0].released == ()
    fleet.close()


def test_no_memory_is_the_trainers_while_a_server_is_starting(monkeypatch):
    memory_of(monkeypatch)
    a, b = Server("a"), Server("b")
    fleet = fleet_of(a, b)
    b.loading.clear()
    fleet.members.lose(fleet.servers[1], "died")
    wait_for(lambda: fleet.servers[1].state is ServerState.STARTING)
    given = threading.Thread(target=fleet.release_memory)
    given.start()
    given.join(0.15)
    assert given.is_alive()
    b.loading.set()
    given.join(10)
    assert [server.released for server in fleet.servers] == [("weights", "cache")] * 2
    fleet.close()


def test_weights_that_were_lost_with_the_memory_are_sent_again_and_no_others():
    fleet, trainers = fleet_of(Server("a")), Trainers()
    with pytest.raises(RuntimeError, match="a transfer was left out"):
        fleet.send_again()
    fleet.transfer(trainers)
    fleet.send_again()
    assert [version for version, _, _ in trainers.sent] == [1, 1]
    trainers.current = False
    with pytest.raises(RuntimeError, match="no longer holds the weights of version 1"):
        fleet.send_again()
