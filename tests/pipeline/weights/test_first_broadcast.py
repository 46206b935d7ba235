"""NCCL's first broadcast returns when every rank has come. Servers that refuse meanwhile are heard.

NCCL is a stand-in: a call that does not return.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from pipeline.weights import broadcast_group
from pipeline.weights.servers import Servers, WeightTransferError
from pipeline.weights.transports import Distributed


class Quiet:
    """Servers that do not answer, or refuse."""

    def __init__(self, timeout_s: float):
        self.timeout_s, self.controls, self.answers = timeout_s, [SimpleNamespace(url="http://far:1")], Servers.answers


@pytest.fixture
def waiting(monkeypatch):
    """A communicator that nobody joins; the event lets it go."""
    joined = threading.Event()

    def broadcast(*args, **kwargs):
        joined.wait(20)
        return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    monkeypatch.setattr(broadcast_group.dist, "broadcast", broadcast)
    yield joined
    joined.set()


def transport(timeout_s: float) -> Distributed:
    return Distributed(Quiet(timeout_s), "cuda")  # pyright: ignore[reportArgumentType]


def refused() -> Future:
    answer: Future = Future()
    answer.set_exception(WeightTransferError("weight transfer to http://far:1 failed: no such group"))
    return answer


def test_a_refusal_is_heard_while_the_communicator_is_made(waiting):
    first, began = transport(60), time.monotonic()
    with pytest.raises(WeightTransferError, match="http://far:1 failed: no such group"):
        first._broadcast(torch.zeros(1), [refused()])
    assert time.monotonic() - began < 10
    assert first.group.broken


def test_a_server_that_never_comes_is_named(waiting):
    with pytest.raises(WeightTransferError, match="http://far:1 did not take a bucket"):
        transport(0.2)._broadcast(torch.zeros(1), [Future()])


def test_later_ones_are_begun_at_once(waiting):
    waiting.set()
    first = transport(10)
    assert not first.group.met
    first._broadcast(torch.zeros(1), [Future()])
    assert first.group.met
    threads = threading.active_count()
    first._broadcast(torch.zeros(1), [Future()])
    assert threading.active_count() <= threads
