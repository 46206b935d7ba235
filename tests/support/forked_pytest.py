"""A worker of pytest-xdist, forked: what is started in place of Python, `... SOCKET -c CODE` (preloaded_imports.py)."""

import sys
import time
from pathlib import Path

from pipeline.forks import ask, end_as
from tests.support.preloaded import IMPORTS_S


def main() -> None:
    place, *arguments = sys.argv[1:]
    deadline = time.monotonic() + IMPORTS_S
    while not Path(place).exists():
        if time.monotonic() > deadline:
            sys.exit(f"no process forks at {place}")
        time.sleep(0.02)
    end_as(ask(place, arguments))


if __name__ == "__main__":
    main()
