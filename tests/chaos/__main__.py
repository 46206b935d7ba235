"""python -m tests.chaos [NAME ...]: try the faults of the table, or those named; 1 where a row differs from it."""

from __future__ import annotations

import sys

from tests.chaos.run import Place
from tests.chaos.table import FAULTS, LATER


def main(names: list[str]) -> int:
    """Prints a row a fault: exit code, seconds to the end, what was said, what was left."""
    faults = {fault.name: fault for fault in (*FAULTS, *LATER)}
    if unknown := set(names) - faults.keys():
        print(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(faults)}")
        return 2
    wrong = 0
    for fault in [faults[name] for name in names] or FAULTS:
        with Place() as place:
            for outcome in fault.try_out(place):
                wrong += bool(outcome.differs)
                print(outcome, flush=True)
    print(f"{wrong} rows differ from the table" if wrong else "every row is as the table says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
