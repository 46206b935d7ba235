"""Children that do not hear the signals which ask a run to end: the run alone answers these.

Slurm, a terminal and some containers send them to every process of a job. Ray's raylet and SGLang's server would end at
once, and the step that the run wants to finish would wait for them.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

ASKING = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside, and theirs, have ASKING blocked, as have threads; SIGKILL ends them.

    One that comes to this thread meanwhile is received at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
