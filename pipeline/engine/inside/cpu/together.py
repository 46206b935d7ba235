"""One piece of work on as many threads as a server's products of matrices have."""

from __future__ import annotations

import functools
import os
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue

import torch


def together(work: Callable[[bool], None]) -> None:
    """work(True) on this thread, and work(False) on each of the others as soon as it can. They must share the work out
    themselves and give up Python's lock; the first must come back when all is done. Nobody waits here for one that
    comes late and finds nothing to do."""
    others = torch.get_num_threads() - 1
    for _ in range(others):
        _calls(others).put(work)
    work(True)


@functools.cache
def _calls(threads: int) -> SimpleQueue[Callable[[bool], None]]:
    """What so many threads of this process take calls from."""
    calls: SimpleQueue[Callable[[bool], None]] = SimpleQueue()

    def take() -> None:
        while True:
            try:
                calls.get()(False)
            except Exception:  # such as no memory, before it took any part
                traceback.print_exc()

    for number in range(threads):
        threading.Thread(target=take, daemon=True, name=f"sameroute products {number}").start()
    return calls


os.register_at_fork(after_in_child=_calls.cache_clear)  # threads are not forked
