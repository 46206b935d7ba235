"""Which server gets a request, from what the servers said and what has been sent to them since."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.engine.membership import FleetServer
from pipeline.engine.pressure import Load, Pressure


def load(running=0, waiting=0, used=0, **others):
    said = {"num_running_reqs": running, "num_waiting_reqs": waiting, "num_used_tokens": used}
    return said | {"max_total_num_tokens": 1000, "max_running_requests": 8} | others


def server(in_flight, **groups):
    made = FleetServer(SimpleNamespace(log_path=Path()), SimpleNamespace())
    made.in_flight = in_flight
    made.groups.update(groups)
    return made


@pytest.mark.parametrize(
    ("said", "room"),
    [
        ([load()], 8),
        ([load(running=3)], 5),
        ([load(running=8, used=100)], 0),
        ([load(running=4, used=600)], 2),  # 300 tokens are left of 900, and each takes 150
        ([load(running=4, used=950)], 0),
        ([load(running=8, waiting=5)], -5),
        ([load(running=3), load(running=8)], 5),  # two schedulers
        ([load(running=3), load(waiting=2)], -2),
    ],
)
def test_room_is_what_the_queue_and_the_cache_leave(said, room):
    assert Load.of(said, in_flight=7).room == room


def test_room_is_counted_on_from_a_servers_last_word():
    two = Load.of([load(running=6)], in_flight=6)
    assert [two.full(in_flight) for in_flight in (5, 6, 7, 8, 9)] == [False, False, False, True, True]
    queue = Load.of([load(running=8, waiting=3)], in_flight=11)
    assert [queue.full(in_flight) for in_flight in (11, 9, 8, 7)] == [True, True, True, False]


def test_a_group_stays_together_unless_its_server_is_full():
    a, b, pressure = server(5, g=5), server(1), Pressure()
    assert pressure.choose([a, b], "g") is a
    assert pressure.choose([a, b], "h") is b
    pressure.hear({a: Load(waiting=1, kv_used=0.5, room=-1, in_flight=5)})
    assert pressure.choose([a, b], "g") is b
    assert (pressure.moved, pressure.queued) == (1, 0)
    a.in_flight = 3  # two have ended since
    assert pressure.choose([a, b], "g") is a


def test_where_all_are_full_the_one_with_the_groups_samples_or_the_fewest_gets_it():
    a, b, pressure = server(5, g=5), server(1), Pressure()
    pressure.hear({s: Load(waiting=1, kv_used=0.5, room=-1, in_flight=s.in_flight) for s in (a, b)})
    assert pressure.choose([a, b], "g") is a
    assert pressure.choose([a, b], "h") is b
    assert (pressure.moved, pressure.queued) == (0, 2)


def test_a_burst_goes_to_the_server_with_room_only_as_far_as_that_goes():
    a, b, pressure = server(8), server(2), Pressure()
    pressure.hear({a: Load.of([load(running=8)], 8), b: Load.of([load(running=2)], 2)})
    for _ in range(10):
        pressure.choose([a, b], None).in_flight += 1
    assert (a.in_flight, b.in_flight) == (10, 10)
    assert pressure.queued == 4


def test_the_metrics_have_the_worst_moment_since_they_were_read():
    pressure, a = Pressure(), server(0)
    pressure.hear({a: Load.of([load(running=8, waiting=4, used=800)], 0)})
    pressure.hear({a: Load.of([load(running=2, used=100)], 0)})
    assert (pressure.metrics()["servers/waiting"], pressure.metrics()["servers/kv_used"]) == (4, 0.1)
