"""Who is being waited for, where a wait is longer than such waits are: a line after some seconds, and again.

A stopped process, a hung network and a long step look alike from outside. The line comes after FIRST_S seconds, or
after three times the median of the last waits for the same, whichever is later: a run at its pace says nothing, and one
that once stood still for minutes says so again the next time.
"""

from __future__ import annotations

import contextlib
import math
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
_BEFORE = 0.9  # of the time that a wait may take: then it is a stall
_AGAIN_S = 300.0  # at most, between two lines


class Waiting:
    """Waits of one process, by what they are for."""

    def __init__(self, say: Callable[[str], None] = to_stderr):
        self.say = say
        self.stalled: Callable[[str, float], None] | None = None
        self._stall_s: float | None = None
        self._last: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))

    def on_stall(self, report: Callable[[str, float], None], after_s: float | None) -> None:
        """Where a wait is a stall, `report(what, seconds)` is called, once a wait: after `after_s` and three times what
        such waits took, and shortly before the time that the wait may take. after_s: None: before that only."""
        self.stalled, self._stall_s = report, after_s

    def begin(self, what: str, first_s: float | None = None, limit_s: float = math.inf) -> Wait:
        """A wait begins. what: what happens meanwhile, "update_policy". first_s: in place of FIRST_S. limit_s: after
        which it is given up."""
        first_s = FIRST_S if first_s is None else first_s
        usual = statistics.median_low(self._last[what]) if self._last[what] else 0.0
        stall_s = math.inf if self._stall_s is None else max(self._stall_s, _LONGER * usual)
        return Wait(self, what, max(first_s, _LONGER * usual), min(stall_s, _BEFORE * limit_s))

    def ended(self, what: str, seconds: float) -> None:
        """A wait is over."""
        self._last[what].append(seconds)

    @contextlib.contextmanager
    def during(self, what: str, who: Callable[[], str], limit_s: float = math.inf) -> Iterator[None]:
        """Around a call that blocks; a thread looks meanwhile. who: is waited for, "the server (log: ...)"."""
        wait, over = self.begin(what, limit_s=limit_s), threading.Event()

        def watch() -> None:
            while not over.wait(max(0.01, min(wait.due, wait.stall_due) - time.monotonic())):
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
    """One wait. due, stall_due: when the next line comes, and when it is a stall, in seconds of time.monotonic()."""

    def __init__(self, waits: Waiting, what: str, first_s: float, stall_s: float = math.inf):
        self._waits, self._what, self._begun = waits, what, time.monotonic()
        self.due = self._begun + first_s
        self.stall_due = math.inf if waits.stalled is None else self._begun + stall_s

    def look(self, who: Callable[[], str]) -> None:
        """Call it now and then: says who is waited for when that is due."""
        if time.monotonic() >= self.stall_due and self._waits.stalled is not None:
            self.stall_due = math.inf
            self._waits.stalled(self._what, time.monotonic() - self._begun)
        if time.monotonic() < self.due:
            return
        names = who()  # may take seconds itself
        now = time.monotonic()
        self._waits.say(f"waiting for {names} in {self._what}, for {now - self._begun:.0f} s")
        self.due = now + min(now - self._begun, _AGAIN_S)

    def done(self) -> None:
        """What was waited for has come."""
        self._waits.ended(self._what, time.monotonic() - self._begun)
