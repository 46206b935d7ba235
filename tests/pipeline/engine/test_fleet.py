"""Servers as one: who gets a request, and which version they hold."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.control import ServerAddress, UnreachableError
from pipeline.engine.decoder import AnswerError
from pipeline.engine.fleet import Fleet, ServerState
from pipeline.engine.interruption import Updates, must_be_current
from pipeline.engine.server import ServerError
from tests.support.fake_servers import SAMPLING, Member, Server, Trainers, fleet_of, load, until


def test_a_sample_goes_to_the_server_of_its_group_else_to_the_one_with_the_fewest_in_flight():
    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        async with fleet, fleet:
            groups = [*"xxxx", *"yy", *"zz", None, None]
            tasks = [asyncio.create_task(fleet.sample([i], SAMPLING, group=g)) for i, g in enumerate(groups)]
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
                await fleet.sample([13], SAMPLING)
            await fleet.sample([1], SAMPLING)
        assert [i for i, _ in a.asked] == [13, 1]
        assert b.asked == []

    asyncio.run(run())


def test_requests_carry_the_version_of_the_last_transfer():
    async def run():
        a = Server("a")
        a.release.set()
        fleet = fleet_of(a)
        async with fleet:
            await fleet.sample([1], SAMPLING)
            fleet.transfer(Trainers())
            await fleet.sample([2], SAMPLING)
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


def test_a_resumed_fleet_gets_the_version_that_it_had():
    fleet, trainers = fleet_of(Server("a")), Trainers()
    fleet.begin_at(7)
    fleet.transfer(trainers)
    assert (fleet.version, trainers.sent) == (7, [(7, ["http://a"], True)])


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


def test_a_request_whose_server_dies_is_sampled_again_by_another():
    async def run():
        a, b = Server("a"), Server("bb")
        for server in (a, b):
            server.release.set()
        fleet = fleet_of(a, b)
        b.starts = 2
        a.loading.clear()
        async with fleet:
            part = await fleet.sample([14], SAMPLING)
            assert part.ids.tolist() == [14, 2]
            assert fleet.metrics()["servers/requests_sent_again"] == 1
            assert fleet.metrics()["servers/lost"] == 1
            assert fleet.servers[0].state in (ServerState.LOST, ServerState.STARTING)
            a.loading.set()
            await until(lambda: fleet.servers[0].state is ServerState.SERVING)  # it starts with the first weights

    asyncio.run(run())


def test_requests_of_a_server_that_hangs_go_to_another():
    async def run():
        a, b = Server("a"), Server("bb")
        b.release.set()
        fleet = fleet_of(a, b)
        async with fleet:
            asked = asyncio.create_task(fleet.sample([5], SAMPLING))
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
            asked = asyncio.create_task(fleet.sample([5], SAMPLING))
            await until(lambda: a.asked)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert len(a.asked) == 1
            assert fleet.servers[0].in_flight == 0

    asyncio.run(run())


def test_a_caller_that_gives_up_just_as_its_server_is_lost_is_not_served_again():
    async def run():
        a, b = Server("a"), Server("b")
        fleet = fleet_of(a, b)
        a.loading.clear()
        async with fleet:
            asked = asyncio.create_task(fleet.sample([5], SAMPLING))
            await until(lambda: a.asked)
            (call,) = fleet.servers[0].calls
            fleet.members.lose(fleet.servers[0], "died")
            call.cancel()  # as the fleet does a tenth of a second later
            while not call.cancelled():
                await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asked, 10)
            assert b.asked == []
        a.loading.set()

    asyncio.run(run())


def test_an_interruption_lets_nothing_through_and_a_transfer_inside_is_of_the_next_version():
    async def run():
        a = Server("a")
        a.release.set()
        fleet, trainers = fleet_of(a), Trainers()
        async with fleet:
            for mode, flush in (("abort", True), ("in_place", False), ("retract", True), ("drain", True)):
                async with fleet.interrupted(mode):
                    asked = asyncio.create_task(fleet.sample([1], SAMPLING))
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
                asked = asyncio.create_task(fleet.sample([1], SAMPLING))
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
            asked = asyncio.create_task(fleet.sample([1], SAMPLING))
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


def test_a_connection_that_breaks_again_and_again_while_its_server_lives_is_an_error():
    async def run():
        a = Server("a")
        a.release.set()
        async with (fleet := fleet_of(a)):
            with pytest.raises(UnreachableError, match="reset by peer"):
                await asyncio.wait_for(fleet.sample([15], SAMPLING), 10)
        assert [i for i, _ in a.asked] == [15] * 3
        assert fleet.members.lost == 0

    asyncio.run(run())


def test_aborts_are_repeated_until_nothing_is_left():
    async def run():
        a = Server("a")
        fleet = fleet_of(a)
        busy = [3, 1, 0, 0]

        async def current_loads(timeout_s=None):
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
            asked = [asyncio.create_task(fleet.sample([n], SAMPLING, group="g")) for n in range(3)]
            await until(lambda: len(a.asked) == 3)
            a.waiting = 1
            await until(lambda: fleet.metrics()["servers/waiting"] == 1)
            asked.append(asyncio.create_task(fleet.sample([3], SAMPLING, group="g")))
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
                await fleet.sample([1], SAMPLING)

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
