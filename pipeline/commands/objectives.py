"""`sameroute objectives [NAME]`."""

from __future__ import annotations

import argparse

from pipeline.errors import NOT_STARTED, SamerouteError


class NoSuchObjectiveError(SamerouteError):
    """There is no objective of this name."""

    exit_code = NOT_STARTED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("name", nargs="?", help="a preset of the table")


def run(options: argparse.Namespace) -> int:
    """0. Raises NoSuchObjectiveError."""
    from pipeline.objectives.describe import describe, describe_all

    if options.name is None:
        print(describe_all())
        return 0
    try:
        text = describe(options.name)
    except KeyError as error:
        raise NoSuchObjectiveError(str(error.args[0])) from error
    print(text)
    return 0
