"""What a phase of a rank takes: its own seconds, and those in which it waited for other ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_ext.joined import JoinedRows
from pipeline.trainer import phases
from pipeline.trainer import rank as ranks


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so; `waited` of them for other ranks."""
    clock = SimpleNamespace(now=0.0, waited=0.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(phases, "waited", lambda: clock.waited)
    return clock


def test_a_rank_that_gets_its_samples_late_spends_that_time_in_its_load(clock, monkeypatch):
    def get(references):
        clock.now += 3.0
        return [JoinedRows([reference]) for reference in references]

    rank = SimpleNamespace(seconds={}, samples=[])
    monkeypatch.setattr(ranks.ray, "get", get)
    ranks.TrainerRank.load(rank, ["sample"])
    assert rank.samples == ["sample"]
    assert rank.seconds == {"load": (3.0, 0.0)}


def test_of_samples_that_do_not_come_nothing_is_made_with_those_of_before(clock, monkeypatch):
    def get(references):
        raise OSError("no room")

    rank = SimpleNamespace(seconds={}, samples=["of before"])
    monkeypatch.setattr(ranks.ray, "get", get)
    with pytest.raises(OSError, match="no room"):
        ranks.TrainerRank.load(rank, ["sample"])
    with pytest.raises(TypeError):
        ranks.TrainerRank.measure(rank, "logprobs", [0])


def test_what_a_rank_waits_for_others_is_not_its_own(clock):
    class Rank:
        def __init__(self):
            self.seconds = {}

        @phases.timed("{}")
        def measure(self, method):
            clock.now, clock.waited = clock.now + 5.0, clock.waited + 4.0

    rank = Rank()
    for method in ("logprobs", "logprobs", "values"):
        rank.measure(method)
    assert rank.seconds == {"logprobs": (2.0, 8.0), "values": (1.0, 4.0)}
