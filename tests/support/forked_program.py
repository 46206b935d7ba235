"""A module of the tests that must be a program of its own: forked by `preloaded_imports.py`, with torch imported."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.forks import ended, request
from tests.support.preloaded import PROGRAM_FORKS_VARIABLE


def run_program(module: str, *arguments: str | Path) -> None:
    """`python -m MODULE ARGUMENTS`. What it says goes beside the last argument, a path, and into the AssertionError
    that is raised where its exit code is not 0."""
    place, said = os.environ[PROGRAM_FORKS_VARIABLE], Path(arguments[-1]).with_suffix(".log")
    with said.open("wb") as out, open(os.devnull, "rb") as nothing:
        streams = nothing.fileno(), out.fileno(), out.fileno()
        with request(place, [module, *map(str, arguments)], dict(os.environ), streams) as connection:
            code = ended(place, connection)
    assert code == 0, said.read_text()[-4000:]
