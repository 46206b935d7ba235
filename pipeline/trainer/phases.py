"""Seconds of one rank by phase of a step: what it worked itself, and what it waited for others."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline.step import BETWEEN

PhaseSeconds = dict[str, tuple[float, float]]
"""phase -> (own, waited), seconds since the last reading."""


def waited() -> float:
    """Seconds that this process has waited for others; 0 before its model is built."""
    clock = sys.modules.get("megatron_ext.collective_clock")
    return 0.0 if clock is None else clock.waited()


class PhaseClock:
    """Of one rank, which has it as `clock`."""

    def __init__(self) -> None:
        self.seconds: PhaseSeconds = {}
        self._taken, self._inside = time.perf_counter(), 0.0

    def add(self, phase: str, passed: float, idle: float) -> None:
        """Count seconds of a phase. idle: that it waited in them; more than passed where a wait ran beside the work, on
        a GPU."""
        own, before = self.seconds.get(phase, (0.0, 0.0))
        self.seconds[phase] = own + max(0.0, passed - idle), before + idle
        self._inside += passed

    def take(self) -> PhaseSeconds:
        """All since it was taken last."""
        now = time.perf_counter()
        taken = self.seconds | {BETWEEN: (max(0.0, now - self._taken - self._inside), 0.0)}
        self.seconds, self._taken, self._inside = {}, now, 0.0
        return taken


def timed[**P, R](name: str | Callable[..., str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a method of a rank that has a `clock`: its time counts under this phase. name: or what says it, of the rank
    and the method's arguments."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            rank: Any = args[0]
            phase = name if isinstance(name, str) else name(*args, **kwargs)
            began, before = time.perf_counter(), waited()
            try:
                return method(*args, **kwargs)
            finally:
                idle = waited() - before
                rank.clock.add(phase, time.perf_counter() - began, idle)

        return call

    return decorate
