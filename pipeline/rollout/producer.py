"""Rollouts beside training: a `Maker` on an event loop in a thread of its own, for as long as a run lives.

The trainer's thread takes the groups of a step, says when new weights come, and is told of errors; it never touches
what the loop's thread works on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from pipeline.rewards import Failures
from pipeline.rollout.answers import Scored
from pipeline.rollout.maker import Maker
from pipeline.rollout.saved import Saved
from pipeline.say import to_stderr
from pipeline.types import Ended, Group

POLL_S = 1.0  # how often a call that waits looks at whether the servers live
_END_S = 30.0  # that tasks and connections may take to end
_THREADS_S = 300.0  # that asyncio.run waits for its threads: one may be sending weights to a server that came back

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """What a step is given. metrics, failures: of what happened since the step before. scored: under the weights of
    this step. ended: untrained, since then."""

    groups: list[Group]
    scored: list[Scored]
    metrics: dict[str, float]
    failures: Failures
    ended: list[Ended]


class Producer:
    """A context; the calls are for one other thread. Each raises the first error of any sample or verifier."""

    def __init__(self, make: Callable[[], Maker], watch: Callable[[], None] = lambda: None):
        """make: called on the loop's thread. watch: called every second while a call waits; raises to end it."""
        self._make, self._watch = make, watch
        self._thread = threading.Thread(target=self._run, name="sameroute rollouts", daemon=True)
        self._begun = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> Producer:
        self._thread.start()
        self._begun.wait()
        if self._error is not None:  # it did not begin, and has ended
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No thread and no request is left; where the block failed, its error counts more than these."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        limit_s = _END_S + _THREADS_S if error is None else _END_S
        self._thread.join(limit_s)
        if not self._thread.is_alive():
            return
        words = f"rollouts did not end in {limit_s:g} s"
        if error is None:
            raise RuntimeError(words)
        to_stderr(f"{words} after the run had failed")

    def check(self) -> None:
        """Raise what has gone wrong."""
        error = self._error or (self._maker.error if self._begun.is_set() else None)
        if error is not None:
            raise error

    def take(self) -> Taken:
        """The groups of the next step, when they are there."""
        return self._call(self._take())

    def pause(self) -> None:
        """Returns when nothing runs on the servers; so it stays until `resume`."""
        self._call(self._maker.pause())

    def resume(self, version: int) -> None:
        """The servers hold `version`, and the step whose groups were taken is trained: all goes on."""
        self._call(self._maker.resume(version))

    def snapshot(self) -> Saved:
        """What a checkpoint needs, between two steps."""
        return self._call(self._maker.snapshot())

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Something else that samples, while groups are made on; its requests share the connections of this loop."""
        return self._call(work())

    async def _take(self) -> Taken:
        return Taken(*await self._maker.take(), *self._maker.metrics(), self._maker.ended())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """On the loop's thread, waited for."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                try:
                    return future.result(POLL_S)
                except TimeoutError:
                    if future.done():
                        raise
                self.check()
                self._watch()
                if not self._thread.is_alive():
                    raise RuntimeError("rollouts have ended")
        finally:
            future.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:  # the trainer's thread raises it
            self._error = error
        finally:
            self._begun.set()

    async def _live(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._maker = self._make()
        async with self._maker:
            self._begun.set()
            await self._stop.wait()
