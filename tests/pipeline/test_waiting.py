"""A wait that is longer than such waits are is said, and again; a run at its pace says nothing."""

from __future__ import annotations

import re
import time

import pytest

from pipeline import waiting
from pipeline.waiting import Waiting


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_S", 0.1)
    monkeypatch.setattr(waiting, "_AGAIN_S", 0.2)
    return []


def test_who_is_waited_for_is_said_and_said_again(said):
    with Waiting(said.append).during("sampling", lambda: "the server"):
        time.sleep(0.65)
    assert len(said) >= 3
    assert all(re.fullmatch(r"waiting for the server in sampling, for \d s", line) for line in said)


def test_a_wait_as_long_as_those_before_says_nothing_and_a_longer_one_does(said):
    waits = Waiting(said.append)
    waits.ended("update_policy", 0.5)
    with waits.during("update_policy", lambda: "rank 0"):
        time.sleep(0.3)
    assert said == []
    with waits.during("build", lambda: "rank 1"):
        time.sleep(0.15)
    assert {line[:18] for line in said} == {"waiting for rank 1"}
    with waits.during("update_policy", lambda: "rank 2"):
        time.sleep(1.7)  # more than three times 0.5 s
    assert said[-1].startswith("waiting for rank 2 in update_policy")


def test_a_run_that_once_stood_still_says_so_again(said):
    waits = Waiting(said.append)
    for seconds in (0.01, 60.0, 0.01):
        waits.ended("sampling", seconds)
    with waits.during("sampling", lambda: "the server"):
        time.sleep(0.2)
    assert said != []


def test_a_polling_wait_asks_who_only_when_a_line_is_due(said):
    asked = []
    wait = Waiting(said.append).begin("load")
    for _ in range(20):
        wait.look(lambda: asked.append(1) or "rank 3")
        time.sleep(0.01)
    assert 1 <= len(asked) == len(said) < 10
    wait.done()


def test_what_ends_a_wait_passes_through(said):
    with pytest.raises(ZeroDivisionError), Waiting(said.append).during("x", str):
        1 / 0  # noqa: B018
