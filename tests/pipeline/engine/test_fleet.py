"""Servers as one: who gets a group, which version they hold, and who is missing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import waiting
from pipeline.config.server import ServerConfig
from pipeline.engine.client import AbortedError, AnswerError, UnreachableError
from pipeline.engine.control import ServerAddress
from pipeline.engine.fleet import Fleet, FleetServer, ServerState
from pipeline.engine.interruption import Updates, must_be_current
from pipeline.engine.keys import ServerKeys
from pipeline.engine.membership import Membership
from pipeline.engine.server import NodeGoneError, ServerError
from pipeline.errors import SamerouteError
from pipeline.types import Sampled


class Server:
    """Stands for a server's process and its client; answers wait until `release`. steered: the calls that steer it."""

    def __init__(self, name):
        self.name, self.open, self.asked, self.steered, self.version, self.deaf = name, 0, [], [], 0, False
        self.url, self.log_path, self.living, self.starts = f"http://{name}", Path(f"{name}.log"), True, 1
        self.keys = ServerKeys(f"{name}-api", f"{name}-admin")
        self.waiting, self.failures, self.nodeless = 0, 0, False
        self.release, self.aborts, self.loading, self.wide_routes = asyncio.Event(), 0, threading.Event(), 0
        self.loading.set()

    def wait_ready(self):
        assert self.loading.wait(10)
        assert self.living

    def alive(self):
        return self.living

    def restart(self):
        self.starts += 1
        self.living, self.deaf = True, False
        if self.nodeless:
            self.living = False
            raise NodeGoneError("the node of the server is gone")
        if self.failures:
            self.failures -= 1
            raise ServerError("the SGLang server ended with code -9 while starting\nTraceback ...")

    def log_tail(self):
        return f"{self.log_path}:\nthe last words"

    async def __aenter__(self):
        self.open += 1
        return self

    async def __aexit__(self, *_):
        self.open -= 1

    async def sample(self, ids, sampling, *, routes_from=0, on_tokens=None):
        assert self.open > 0
        began = self.version
        self.asked.append((ids[0], began))
        await self.release.wait()
        if ids == [13]:
            raise ServerError("unlucky")
        if ids == [14] and self.starts == 1:
            self.living = False
            raise UnreachableError("cut off")
        if ids == [15]:
            raise UnreachableError("reset by peer")
        versions = np.array([began, self.version], np.int32)
        empty = np.zeros(2, np.float32)
        return Sampled(np.array([ids[0], len(self.name)], np.int32), empty, None, versions, "stop")

    async def score(self, ids):
        if self.aborts:
            self.aborts -= 1
            raise AbortedError("aborted")
        return self.name, ids

    async def ask(self, method, path, body=None):
        self.steered.append(path)
        if path == "/abort_request":
            self.release.set()
        return {}

    async def current_loads(self):
        return [load(waiting=self.waiting)]


class Member(FleetServer):
    """Asks no process."""

    def answers(self, timeout_s):
        return self.process.living and not self.process.deaf


class Trainers:
    """Stands for the trainer ranks; keeps what was sent. bad: versions that a server does not take, once each."""

    def __init__(self, *bad):
        self.sent, self.bad, self.current = [], list(bad), True

    def send_weights(self, version, servers, *, flush):
        self.sent.append((version, [server.url for server in servers], flush))
        if version in self.bad:
            self.bad.remove(version)
            raise ServerError("unlucky")

    def send_again(self, version, servers):
        if self.current:
            self.send_weights(version, servers, flush=True)
        return self.current


def load(running=0, waiting=0, used=0):
    return {
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_used_tokens": used,
        "max_total_num_tokens": 1000,
        "max_running_requests": 8,
    }


def fleet_of(*servers, **settings):
    fleet = Fleet([Member(server, server) for server in servers], ServerConfig(probe_timeout_s=0.05, **settings))
    fleet.members.say = lambda _: None
    fleet.wait_ready()
    return fleet


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_sample_goes_to_the_server_of_its_group_else_to_the_one_with_the_fewest_in_flight():
    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        async with fleet, fleet:
            groups = [*"xxxx", *"yy", *"zz", None, None]
            tasks = [asyncio.create_task(fleet.sample([i], None, group=g)) for i, g in enumerate(groups)]
            await until(lambda: len(a.asked) + len(b.asked) == len(groups))
            assert [i for i, _ in a.asked] == [0, 1, 2, 3, 8]
            assert [i for i, _ in b.asked] == [4, 5, 6, 7, 9]
            b.release.set()
            await asyncio.gather(*tasks[4:8], tasks[9])
            assert await fleet.score([5]) == ("b", [5])
            a.release.set()
            assert (await tasks[0]).ids.tolist() == [0, 1]
            assert [part.server for part in await asyncio.gather(*tasks)] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1]
            assert all(0 <= part.seconds < 60 for part in await asyncio.gather(*tasks))
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


def test_the_fleet_counts_its_transfers():
    fleet, trainers = fleet_of(Server("a")), Trainers()
    assert fleet.version == 0
    fleet.transfer(trainers)
    fleet.begin_at(13)
    fleet.transfer(trainers)
    assert fleet.version == 13
    assert trainers.sent == [(1, ["http://a"], True), (13, ["http://a"], True)]


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


def test_a_resumed_fleet_gets_the_version_that_it_had():
    fleet, trainers = fleet_of(Server("a")), Trainers()
    fleet.begin_at(7)
    fleet.transfer(trainers)
    assert (fleet.version, trainers.sent) == (7, [(7, ["http://a"], True)])


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


def test_no_request_goes_to_a_server_before_it_is_ready():
    with pytest.raises(ServerError, match="no server takes requests: starting, starting"):
        asyncio.run(Fleet([Member(s, s) for s in (Server("a"), Server("b"))]).score([1]))


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
                await fleet.sample([1], None)
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
            assert (await fleet.sample([1], None)).server == 1
            fleet.transfer(trainers := Trainers())
            assert trainers.sent == [(1, ["http://b"], True)]
            b.living = False
            with contextlib.suppress(NodeGoneError):  # known already
                fleet.members.check()
            with pytest.raises(NodeGoneError, match="node 2 is gone"):
                await asyncio.wait_for(fleet.sample([1], None), 10)

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
            await fleet.sample([1], None)
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
                await asyncio.wait_for(fleet.sample([1], None), 5)
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


def test_a_request_whose_server_dies_is_sampled_again_by_another():
    async def run():
        a, b = Server("a"), Server("bb")
        for server in (a, b):
            server.release.set()
        fleet = fleet_of(a, b)
        b.starts = 2
        a.loading.clear()
        async with fleet:
            part = await fleet.sample([14], None)
            assert part.ids.tolist() == [14, 2]
            assert fleet.metrics()["servers/requests_sent_again"] == 1
            assert fleet.metrics()["servers/lost"] == 1
            assert fleet.servers[0].state in (ServerState.LOST, ServerState.STARTING)
            a.loading.set()
            await until(lambda: fleet.servers[0].state is ServerState.SERVING)  # it starts with the first weights

    asyncio.run(run())


def test_many_requests_of_one_death_count_as_one_loss():
    async def run():
        a, b = Server("a"), Server("bb")
        b.starts = 2
        a.release.set()
        b.release.set()
        fleet = fleet_of(a, b, max_restarts=1)
        a.loading.clear()
        async with fleet:
            parts = await asyncio.gather(*(fleet.sample([14], None, group=1) for _ in range(20)))
            assert [part.ids.tolist() for part in parts] == [[14, 2]] * 20
            assert fleet.members.lost == 1
            a.loading.set()

    asyncio.run(run())


def test_requests_of_a_server_that_hangs_go_to_another():
    async def run():
        a, b = Server("a"), Server("bb")
        b.release.set()
        fleet = fleet_of(a, b)
        async with fleet:
            asked = asyncio.create_task(fleet.sample([5], None))
            await until(lambda: a.asked)
            a.loading.clear()
            a.living = False  # the probe finds it
            assert (await asked).ids.tolist() == [5, 2]
            a.loading.set()

    asyncio.run(run())


def test_a_caller_that_gives_up_is_not_served_again():
    async def run():
        a = Server("a")
        fleet = fleet_of(a)
        async with fleet:
            asked = asyncio.create_task(fleet.sample([5], None))
            await until(lambda: a.asked)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert len(a.asked) == 1
            assert fleet.servers[0].in_flight == 0

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
                await fleet.sample([number], None)
            assert b.asked == []
            assert trainers.sent == [(1, ["http://a", "http://b"], True)]
            trainers.current = True
            await until(lambda: fleet.servers[1].state is ServerState.SERVING)
            assert trainers.sent[1:] == [(1, ["http://b"], True)]
            assert b.version == 1

    asyncio.run(run())


def test_an_interruption_lets_nothing_through_and_a_transfer_inside_is_of_the_next_version():
    async def run():
        a = Server("a")
        a.release.set()
        fleet, trainers = fleet_of(a), Trainers()
        async with fleet:
            for mode, flush in (("abort", True), ("in_place", False), ("retract", True), ("drain", True)):
                async with fleet.interrupted(mode):
                    asked = asyncio.create_task(fleet.sample([1], None))
                    await asyncio.sleep(0.01)
                    assert len(a.asked) == fleet.version
                    assert fleet.servers[0].state is ServerState.PAUSED
                    fleet.transfer(trainers)
                await asked
                assert a.asked[-1] == (1, fleet.version)
                assert trainers.sent[-1] == (fleet.version, ["http://a"], flush)
        halts = ["/pause_generation", "/continue_generation"]
        assert a.steered == ["/abort_request", *halts, *halts]

    asyncio.run(run())


def test_a_request_that_waited_for_one_interruption_does_not_slip_into_the_next():
    async def run():
        a = Server("a")
        a.release.set()
        fleet = fleet_of(a)
        async with fleet:
            async with fleet.interrupted("abort"):
                asked = asyncio.create_task(fleet.sample([1], None))
                await asyncio.sleep(0)
            async with fleet.interrupted("abort"):
                for _ in range(20):
                    await asyncio.sleep(0)
                assert a.asked == []
            await asked

    asyncio.run(run())


@pytest.mark.parametrize(("mode", "mixed"), [("in_place", [False, True]), ("retract", None)])
def test_an_answer_that_stood_still_through_a_transfer_is_marked_by_how_it_stood(mode, mixed):
    async def run():
        a = Server("a")
        fleet = fleet_of(a)
        async with fleet:
            asked = asyncio.create_task(fleet.sample([1], None))
            await until(lambda: a.asked)
            async with fleet.interrupted(mode):
                fleet.transfer(Trainers())
            a.release.set()
            part = await asked
        assert part.weight_versions.tolist() == [0, 1]
        assert (None if part.mixed_kv is None else part.mixed_kv.tolist()) == mixed
        assert fleet.metrics()["servers/requests_interrupted"] == 1

    asyncio.run(run())


def test_a_server_that_joins_in_a_transfer_gets_no_request_before_the_interruption_ends():
    async def run():
        fleet = fleet_of(Server("a"), Server("b"))
        late = fleet.servers[1]
        async with fleet:
            async with fleet.interrupted("in_place"):
                late.state = ServerState.PENDING_WEIGHTS
                fleet.transfer(Trainers())
                assert late.state is ServerState.PAUSED
            assert late.state is ServerState.SERVING

    asyncio.run(run())


def test_after_a_transfer_that_the_trainer_broke_off_no_server_serves_old_weights_for_new():
    class Broken(Trainers):
        def send_weights(self, version, servers, *, flush):
            raise RuntimeError("a rank died")

    async def run():
        fleet = fleet_of(Server("a"))
        async with fleet:
            with pytest.raises(RuntimeError, match="a rank died"):
                async with fleet.interrupted("abort"):
                    fleet.transfer(Broken())
            assert fleet.servers[0].state is ServerState.PENDING_WEIGHTS

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


def test_a_connection_that_breaks_again_and_again_while_its_server_lives_is_an_error():
    async def run():
        a = Server("a")
        a.release.set()
        async with (fleet := fleet_of(a)):
            with pytest.raises(UnreachableError, match="reset by peer"):
                await asyncio.wait_for(fleet.sample([15], None), 10)
        assert [i for i, _ in a.asked] == [15] * 3
        assert fleet.members.lost == 0

    asyncio.run(run())


def test_aborts_are_repeated_until_nothing_is_left():
    async def run():
        a = Server("a")
        fleet = fleet_of(a)
        busy = [3, 1, 0, 0]

        async def current_loads():
            return [load(waiting=busy.pop(0))]

        a.current_loads = current_loads
        async with fleet, fleet.interrupted("abort"):
            assert a.steered == ["/abort_request"] * 3

    asyncio.run(run())


def test_a_server_that_queues_gets_no_more_while_another_has_room(monkeypatch):
    monkeypatch.setattr("pipeline.engine.fleet._LISTEN_S", 0.01)

    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        async with fleet:
            asked = [asyncio.create_task(fleet.sample([n], None, group="g")) for n in range(3)]
            await until(lambda: len(a.asked) == 3)
            a.waiting = 1
            await until(lambda: fleet.metrics()["servers/waiting"] == 1)
            asked.append(asyncio.create_task(fleet.sample([3], None, group="g")))
            await until(lambda: b.asked)
            a.release.set()
            b.release.set()
            await asyncio.gather(*asked)
        assert [n for n, _ in b.asked] == [3]
        assert fleet.metrics()["servers/requests_moved"] == 1
        assert fleet.metrics()["servers/requests_queued"] == 0

    asyncio.run(run())


def test_a_score_that_an_interruption_aborts_is_asked_again():
    async def run():
        a = Server("a")
        a.aborts = 2
        async with (fleet := fleet_of(a)):
            assert await fleet.score([5]) == ("a", [5])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("modes", "mixed"),
    [
        (("in_place", "in_place"), [0, 1, 1]),
        (("in_place", "retract"), [0, 1, 0]),
        (("retract", "in_place"), [0, 0, 1]),
    ],
)
def test_tokens_over_older_keys_and_values_are_marked(modes, mixed):
    updates = Updates({4: modes[0], 5: modes[1]})
    assert updates.mixed_kv(np.array([3, 4, 5])).tolist() == [bool(m) for m in mixed]
    assert updates.mixed_kv(np.array([4, 4])) is None
    assert Updates({4: "retract", 5: "retract"}).mixed_kv(np.array([3, 4, 5])) is None


def test_tokens_of_weights_that_the_fleet_never_held_are_refused():
    async def run():
        a = Server("a")
        a.release.set()
        fleet = fleet_of(a)
        async with fleet:
            a.version = 1
            with pytest.raises(AnswerError, match=r"from weights \[1\], the fleet held 0 to 0"):
                await fleet.sample([1], None)

    asyncio.run(run())


@pytest.mark.parametrize(("versions", "current"), [((5, 6), True), ((), True), ((4, 5), False), ((6, 7), False)])
def test_tokens_are_of_weights_that_were_held_from_the_request_to_its_end(versions, current):
    with contextlib.nullcontext() if current else pytest.raises(ValueError, match="the fleet held 5 to 6"):
        must_be_current(np.array(versions, np.int32), 5, 6)


def test_addresses_are_in_the_order_of_the_servers():
    a, b = Server("a"), Server("b")
    assert fleet_of(a, b).addresses == [
        ServerAddress("http://a", Path("a.log"), a.keys),
        ServerAddress("http://b", Path("b.log"), b.keys),
    ]
