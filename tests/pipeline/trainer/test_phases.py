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

    rank = SimpleNamespace(clock=phases.PhaseClock(), samples=[])
    monkeypatch.setattr(ranks.ray, "get", get)
    ranks.TrainerRank.load(rank, ["sample"])
    assert rank.samples == ["sample"]
    assert rank.clock.take() == {"load": (3.0, 0.0), "between": (0.0, 0.0)}


def test_of_samples_that_do_not_come_nothing_is_made_with_those_of_before(clock, monkeypatch):
    def get(references):
        raise OSError("no room")

    rank = SimpleNamespace(clock=phases.PhaseClock(), samples=["of before"])
    monkeypatch.setattr(ranks.ray, "get", get)
    with pytest.raises(OSError, match="no room"):
        ranks.TrainerRank.load(rank, ["sample"])
    with pytest.raises(TypeError):
        ranks.TrainerRank.measure(rank, "logprobs", [0])


def test_what_a_rank_waits_for_others_is_not_its_own(clock):
    class Rank:
        def __init__(self):
            self.clock = phases.PhaseClock()

        @phases.timed(lambda rank, method: method)
        def measure(self, method):
            clock.now, clock.waited = clock.now + 5.0, clock.waited + 4.0

    rank = Rank()
    for method in ("logprobs", "logprobs", "values"):
        rank.measure(method)
    assert rank.clock.take() == {"logprobs": (2.0, 8.0), "values": (1.0, 4.0), "between": (0.0, 0.0)}


def test_what_no_phase_has_lies_between_them(clock):
    own = phases.PhaseClock()
    for passed, idle in ((2.0, 0.5), (1.0, 3.0)):  # on a GPU a wait may last longer than the call
        clock.now += 7.0
        own.add("update", passed, idle)
        clock.now += passed
    clock.now += 1.0
    assert own.take() == {"update": (1.5, 3.5), "between": (15.0, 0.0)}
    clock.now += 4.0
    assert own.take() == {"between": (4.0, 0.0)}


def test_a_rank_that_does_not_send_counts_what_it_gathers_for_who_does(clock):
    for sender, phase in ((None, "gather"), (SimpleNamespace(sent=SimpleNamespace(nbytes=8, seconds=1.0)), "sync")):
        rank = SimpleNamespace(clock=phases.PhaseClock(), sender=sender, _rounds=lambda: iter(()))
        if sender is not None:
            sender.send_rounds = lambda rounds, version, flush: None
        ranks.TrainerRank.send_weights(rank, 1, True)
        assert set(rank.clock.take()) == {phase, "between"}
