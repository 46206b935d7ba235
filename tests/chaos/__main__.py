"""python -m tests.chaos [NAME ...]: try the faults of the table, or those named; 1 where a row differs from it."""

from __future__ import annotations

import sys

from tests.chaos.run import Place
from tests.chaos.table import FAULTS


def main(names: list[str]) -> int:
    """Prints a row a fault: exit code, seconds to the end, what was said, what was left."""
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        print(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in FAULTS)}")
        return 2
    wrong = 0
    for fault in FAULTS:
        if names and fault.name not in names:
            continue
        with Place() as place:
            for outcome in fault.try_out(place):
                wrong += bool(outcome.differs)
                print(outcome, flush=True)
    print(f"{wrong} rows differ from the table" if wrong else "every row is as the table says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
