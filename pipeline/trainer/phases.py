"""Seconds of one rank by phase of a step: what it worked itself, and what it waited for other ranks."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

PhaseSeconds = dict[str, tuple[float, float]]
"""phase -> (own, waited), seconds since the last reading."""


def waited() -> float:
    """Seconds that this process has waited for others; 0 before its model is built."""
    clock = sys.modules.get("megatron_ext.collective_clock")
    return 0.0 if clock is None else clock.waited()


def timed[**P, R](name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a method of a rank that has `seconds`: its time counts under this phase. "{}": its first argument."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            began, before = time.perf_counter(), waited()
            try:
                return method(*args, **kwargs)
            finally:
                idle = waited() - before
                add(args[0], name.format(*args[1:]), time.perf_counter() - began - idle, idle)

        return call

    return decorate


def add(rank: Any, phase: str, own: float, idle: float) -> None:
    """Count it. own: below 0 where a wait ran beside the work, on a GPU."""
    before = rank.seconds.get(phase, (0.0, 0.0))
    rank.seconds[phase] = before[0] + max(0.0, own), before[1] + idle
