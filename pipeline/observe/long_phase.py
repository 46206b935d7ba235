"""What goes on before a run's first step and after its last, told while it goes on: how far it is, and about how long
it will take.

A line comes after EVERY_S seconds, and again after as many or, in what takes minutes, a tenth of the time so far; a
phase that is over by then says nothing. All phases and their seconds stand in a log.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

EVERY_S = 8.0
_LONGER = 0.1

Far = tuple[float, float, str]
"""Done, in all, of what: (0.4, 1.6, "GB")."""


def nobody(line: str) -> None:
    """Hears what is said where nobody listens."""


def unknown() -> Far | None:
    """How far something is that cannot tell."""
    return None


class LongPhases:
    """say: hears the lines. log: a file that gets a line for each phase; None: there is none."""

    def __init__(self, say: Callable[[str], None] = nobody, log: Path | None = None, every_s: float = EVERY_S):
        self.say, self.log, self.every_s = say, log, every_s

    @contextlib.contextmanager
    def of(self, what: str, far: Callable[[], Far | None] = unknown) -> Iterator[None]:
        """Around a phase. what: "the trainer loads the model". far: asked on another thread; None: it cannot tell."""
        began, over = time.monotonic(), threading.Event()
        spoken: list[str] = []

        def watch() -> None:
            pause = self.every_s
            while not over.wait(pause):
                line = _line(what, time.monotonic() - began, far())
                if over.is_set():  # while we asked how far it is
                    return
                self.say(line)
                spoken.append(line)
                pause = max(self.every_s, _LONGER * (time.monotonic() - began))

        thread = threading.Thread(target=watch, name="sameroute long phase", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._end(thread, over, f"{what}: failed after {time.monotonic() - began:.1f} s", spoken=False)
            raise
        self._end(thread, over, f"{what}: done after {time.monotonic() - began:.1f} s", spoken=bool(spoken))

    def _end(self, thread: threading.Thread, over: threading.Event, line: str, *, spoken: bool) -> None:
        over.set()
        thread.join()
        if spoken:
            self.say(line)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def _line(what: str, seconds: float, far: Far | None) -> str:
    line = f"{what}: {seconds:.0f} s so far"
    if far is None or not 0 < far[0] <= far[1]:
        return line
    done, total, unit = far
    left = seconds * (total - done) / done
    digits = 1 if unit == "GB" else 0
    return f"{line}, {done:.{digits}f} of {total:.{digits}f} {unit}, about {left:.0f} s more"
