"""`sameroute objectives [NAME]`."""

from __future__ import annotations

import argparse
import shutil

from pipeline.errors import NOT_STARTED, SamerouteError

NARROWEST, WIDEST = 80, 100
"""Columns that the text is made for. Longer lines are hard to read, and shorter ones would cut equations."""


class NoSuchObjectiveError(SamerouteError):
    """There is no objective of this name."""

    exit_code = NOT_STARTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("name", nargs="?", help="a preset of the table")


def run(options: argparse.Namespace) -> int:
    """0. Raises NoSuchObjectiveError."""
    from pipeline.objectives.describe import describe, describe_all

    columns = shutil.get_terminal_size((WIDEST, 24)).columns  # WIDEST where it is no terminal
    width = min(max(columns, NARROWEST), WIDEST)
    if options.name is None:
        print(describe_all(width))
        return 0
    try:
        text = describe(options.name, width)
    except KeyError as error:
        raise NoSuchObjectiveError(str(error.args[0])) from error
    print(text)
    return 0
