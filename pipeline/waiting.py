"""Who is being waited for, where a wait is longer than such waits are: a line after some seconds, and again.

A stopped process, a hung network and a long step look alike from outside. The line comes after FIRST_S seconds, or
after three times the median of the last waits for the same, whichever is later: a run at its pace says nothing, and one
that once stood still for minutes says so again the next time.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from pipeline.say import to_stderr

FIRST_S = 10.0
START_S = 60.0  # in place of it for what starts a process or reads a model
_LONGER = 3.0  # than the last ones took
_LAST = 9  # waits that count
_AGAIN_S = 300.0  # at most, between two lines


class Waiting:
    """Waits of one process, by what they are for."""

    def __init__(self, say: Callable[[str], None] = to_stderr):
        self.say = say
        self._last: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))

    def begin(self, what: str, first_s: float | None = None) -> Wait:
        """A wait begins. what: what happens meanwhile, "update_policy". first_s: in place of FIRST_S."""
        first_s = FIRST_S if first_s is None else first_s
        usual = statistics.median_low(self._last[what]) if self._last[what] else 0.0
        return Wait(self, what, max(first_s, _LONGER * usual))

    def ended(self, what: str, seconds: float) -> None:
        """A wait is over."""
        self._last[what].append(seconds)

    @contextlib.contextmanager
    def during(self, what: str, who: Callable[[], str]) -> Iterator[None]:
        """Around a call that blocks; a thread looks meanwhile. who: is waited for, "the server (log: ...)"."""
        wait, over = self.begin(what), threading.Event()

        def watch() -> None:
            while not over.wait(max(0.01, wait.due - time.monotonic())):
                wait.look(who)

        thread = threading.Thread(target=watch, name="sameroute waiting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        wait.done()


class Wait:
    """One wait. due: when the next line comes, in seconds of time.monotonic()."""

    def __init__(self, waits: Waiting, what: str, first_s: float):
        self._waits, self._what, self._begun = waits, what, time.monotonic()
        self.due = self._begun + first_s

    def look(self, who: Callable[[], str]) -> None:
        """Call it now and then: says who is waited for when that is due."""
        if time.monotonic() < self.due:
            return
        names = who()  # may take seconds itself
        now = time.monotonic()
        self._waits.say(f"waiting for {names} in {self._what}, for {now - self._begun:.0f} s")
        self.due = now + min(now - self._begun, _AGAIN_S)

    def done(self) -> None:
        """What was waited for has come."""
        self._waits.ended(self._what, time.monotonic() - self._begun)
