"""A wait that is longer than such waits are is said, and again; a run at its pace says nothing."""

from __future__ import annotations

import re
import time

import pytest

from pipeline import waiting
from pipeline.waiting import Waiting


class Clock:
    """Stands in the place of time.monotonic()."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def said():
    return []


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def lines_at(clock, wait, *seconds, who="rank 0"):
    """Look at these moments after the beginning of a wait."""
    began = clock.now
    for moment in seconds:
        clock.now = began + moment
        wait.look(lambda: who)


def test_who_is_waited_for_is_said_and_said_again_by_a_thread_while_a_call_blocks(said, monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_S", 0.02)
    deadline = time.monotonic() + 10
    with Waiting(said.append).during("sampling", lambda: "the server"):
        while len(said) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert all(re.fullmatch(r"waiting for the server in sampling, for \d s", line) for line in said)


def test_a_line_comes_after_ten_seconds_and_then_after_twice_the_time(said, clock):
    lines_at(clock, Waiting(said.append).begin("build"), 9.9, 10, 11, 19, 20, 39, 40, 41)
    assert said == [f"waiting for rank 0 in build, for {seconds} s" for seconds in (10, 20, 40)]


def test_a_line_comes_every_five_minutes_at_least(said, clock):
    lines_at(clock, Waiting(said.append).begin("build"), 1000, 1299, 1300, 1599, 1600)
    assert [line.rpartition("for ")[2] for line in said] == ["1000 s", "1300 s", "1600 s"]


def test_a_wait_as_long_as_those_before_says_nothing_and_a_longer_one_does(said, clock):
    waits = Waiting(said.append)
    waits.ended("update_policy", 20)
    lines_at(clock, waits.begin("update_policy"), 11, 40, 59)
    assert said == []
    lines_at(clock, waits.begin("build"), 11, who="rank 1")
    lines_at(clock, waits.begin("update_policy"), 61, who="rank 2")
    assert [line.partition(",")[0] for line in said] == [
        "waiting for rank 1 in build",
        "waiting for rank 2 in update_policy",
    ]


def test_a_run_that_once_stood_still_says_so_again(said, clock):
    waits = Waiting(said.append)
    for seconds in (1, 600, 1):
        waits.ended("sampling", seconds)
    lines_at(clock, waits.begin("sampling"), 11)
    assert len(said) == 1


def test_how_long_a_wait_took_is_known_to_the_next(said, clock):
    waits = Waiting(said.append)
    wait = waits.begin("load")
    clock.now += 50
    wait.done()
    lines_at(clock, waits.begin("load"), 149, 151)
    assert [line.rpartition("for ")[2] for line in said] == ["151 s"]


def test_a_polling_wait_asks_who_only_when_a_line_is_due(said, clock):
    asked = []
    wait = Waiting(said.append).begin("load")
    for _ in range(250):
        clock.now += 0.1
        wait.look(lambda: asked.append(1) or "rank 3")
    assert len(asked) == len(said) == 2


def test_what_ends_a_wait_passes_through(said):
    with pytest.raises(ZeroDivisionError), Waiting(said.append).during("x", str):
        1 / 0  # noqa: B018


def test_a_stall_is_told_once_a_wait_after_its_time_and_three_times_the_usual(said, clock):
    waits, stalls = Waiting(said.append), []
    waits.on_stall(lambda what, seconds: stalls.append((what, seconds)), 30)
    lines_at(clock, waits.begin("update"), 29, 30, 60)
    assert stalls == [("update", 30)]
    for _ in range(3):
        waits.ended("update", 20)
    lines_at(clock, waits.begin("update"), 59, 60)
    assert stalls[1:] == [("update", 60)]


def test_a_stall_is_told_before_the_time_out_ends_the_run(clock):
    waits, stalls = Waiting(lambda _: None), []
    waits.on_stall(lambda what, seconds: stalls.append(seconds), None)
    lines_at(clock, waits.begin("update", limit_s=100), 89, 91)
    lines_at(clock, waits.begin("update"), 10_000)
    assert stalls == [91]


def test_a_stall_is_told_while_a_call_blocks(said):
    waits, stalls = Waiting(said.append), []
    waits.on_stall(lambda what, seconds: stalls.append(what), 0.02)
    deadline = time.monotonic() + 10
    with waits.during("sampling", lambda: "the server"):
        while not stalls:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert stalls == ["sampling"]
