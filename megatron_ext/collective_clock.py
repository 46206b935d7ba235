"""Seconds that this process has waited for others: inside `Work.wait` of torch's collectives, and in `waiting`.

A rank that is slow makes all others wait in the next collective, so that all are done at the same time. What a call
took less what it waited is the rank's own share, and tells who was slow.

Over gloo a collective waits in `Work.wait`, on the processor. Over NCCL that call only orders streams, so the wait is
on the GPU: two events around it, read once the call that they belong to is over. A collective that NCCL runs on the
current stream itself is not seen there; the sum is then a lower bound.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import Work

_lock = threading.Lock()
_state: dict[str, Any] = {"seconds": 0.0, "events": [], "installed": False}


def install() -> None:
    """Measure from now on, in every thread of this process; once is enough."""
    if _state["installed"]:
        return
    _state["installed"] = True
    wait = Work.wait

    def timed_wait(work: Any, *arguments: Any, **settings: Any) -> Any:
        on_gpu = torch.cuda.is_initialized()
        before = _event() if on_gpu else None
        began = time.perf_counter()
        try:
            return wait(work, *arguments, **settings)
        finally:
            with _lock:
                _state["seconds"] += time.perf_counter() - began
                if before is not None:
                    _state["events"].append((before, _event()))

    Work.wait = timed_wait


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a wait of this process for others that is no collective of torch, and holds none."""
    began = time.perf_counter()
    try:
        yield
    finally:
        with _lock:
            _state["seconds"] += time.perf_counter() - began


def waited() -> float:
    """Seconds so far. On a GPU it waits until what was measured there has run."""
    with _lock:
        events, _state["events"] = _state["events"], []
    for before, after in events:
        after.synchronize()
        with _lock:
            _state["seconds"] += before.elapsed_time(after) / 1e3
    return _state["seconds"]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
