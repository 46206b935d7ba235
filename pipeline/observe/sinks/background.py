"""Calls to a receiver that may be slow or away, made in order by a thread of their own: no step waits for them.

A failed call is said and counted. It does not end the run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class DeliveryError(RuntimeError):
    """A receiver did not take what it was sent; the message says which and why."""


class Background:
    """failures: calls that raised DeliveryError, or were never made because `close` did not wait any longer."""

    def __init__(self, name: str, say: Callable[[str], None]):
        """name: of the receiver. say: takes a line for people; called from the thread."""
        self.name, self.failures = name, 0
        self._say = say
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"sameroute {name}", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Make the call after those that came before it. Raises what an earlier one raised beside DeliveryError."""
        self._raise()
        self._calls.put(call)

    def close(self, timeout_s: float) -> None:
        """Wait until all calls are made, at most so long; the rest is dropped, counted and said."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            left = self._drop()
            self._failed(f"{left} calls were dropped, {self.name} did not answer in {timeout_s:g} s", max(left, 1))
        self._raise()

    def wait(self, timeout_s: float) -> None:
        """Wait until all calls so far are made, at most so long."""
        deadline = time.monotonic() + timeout_s
        while self._calls.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except DeliveryError as error:
                self._failed(str(error), 1)
            except BaseException as error:  # a mistake of ours: the run's thread raises it
                self._error = error
                return
            finally:
                self._calls.task_done()

    def _failed(self, why: str, count: int) -> None:
        self.failures += count
        self._say(f"{self.name}: {why} (failures so far: {self.failures})")

    def _drop(self) -> int:
        left = 0
        while True:
            try:
                left += self._calls.get_nowait() is not None
            except queue.Empty:
                return left

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
