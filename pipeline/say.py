"""A line for people where there is no console: before a run has one, after it, and from below it."""

from __future__ import annotations

import sys


def to_stderr(line: str) -> None:
    """Where a progress bar is shown, rich puts it above that."""
    print(f"sameroute: {line}", file=sys.stderr, flush=True)
