"""`sameroute report RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, help="run directory; report.html is written into it")


def run(options: argparse.Namespace) -> int:
    """0. Raises ReportError."""
    from pipeline.observe.report.page import write_report

    print(write_report(options.run))
    return 0
