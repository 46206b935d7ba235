"""python -m tests.chaos [NAME ...]: try the faults of the table, or those named; 1 where a row differs from it.

Two are tried at a time, each in a place of its own: much of a fault is waiting. The random ones are tried alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos.asynchronous import ASYNCHRONOUS
from tests.chaos.run import Place, end_all
from tests.chaos.table import FAULTS, Fault
from tests.support import preloaded


def main(names: list[str]) -> int:
    """Prints a row a fault: exit code, seconds to the end, what was said, what was left."""
    every = [*FAULTS, ASYNCHRONOUS]
    faults = {fault.name: fault for fault in every}
    if unknown := set(names) - faults.keys():
        print(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(faults)}")
        return 2
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        forks = preloaded.start(Path(folder), os.getpid())
        chosen = [faults[name] for name in names] or every
        wrong = two_at_a_time([fault for fault in chosen if fault is not ASYNCHRONOUS], forks)
        wrong += sum(tried(fault, forks) for fault in chosen if fault is ASYNCHRONOUS)
    print(f"{wrong} rows differ from the table" if wrong else "every row is as the table says")
    return 1 if wrong else 0


def two_at_a_time(faults: Sequence[Fault], forks: Mapping[str, str]) -> int:
    """How many of their rows differ. Nothing of them is left where this process is interrupted."""
    with ThreadPoolExecutor(2) as threads:
        rows = [threads.submit(tried, fault, forks) for fault in faults]
        try:
            return sum(row.result() for row in rows)
        except BaseException:
            for row in rows:
                row.cancel()
            end_all()
            raise


def tried(fault: Fault, forks: Mapping[str, str]) -> int:
    """Prints the rows of one fault; how many differ."""
    wrong = 0
    try:
        with Place(forks) as place:
            for outcome in fault.try_out(place):
                wrong += bool(outcome.differs)
                print(outcome, flush=True)
    except (AssertionError, subprocess.TimeoutExpired) as error:  # it did not come as far as the fault, or no further
        wrong += 1
        print(f"{fault.name} DIFFERS: {error}", flush=True)
    return wrong


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of `timeout` leaves nothing running either
    sys.exit(main(sys.argv[1:]))
