"""A run directory for one run alone: made, locked, and an interrupted start in it undone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.disk import earlier
from pipeline.disk.disk_errors import RunDirectoryError, free_space
from pipeline.disk.lock import Lock, hold
from pipeline.say import to_stderr


@dataclass(frozen=True)
class Claim:
    """notes: what was found there and put right, a sentence each."""

    lock: Lock
    notes: list[str]


@contextlib.contextmanager
def claim(directory: Path, say: Callable[[str], None] = to_stderr) -> Iterator[Claim]:
    """The directory, this process's while the block lasts. What was made for it and stayed empty goes again.

    Raises RunDirectoryError where it cannot be made or written, or belongs to a run that is going on.
    """
    made = [p for p in (directory, *directory.parents) if not os.path.exists(p)]
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            lock = stack.enter_context(hold(directory, say))
            notes = _repair(directory)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(f"{_in_the_way(directory)}; set run.directory to another path") from error
        except OSError as error:
            raise RunDirectoryError(cannot_write(directory, error)) from error
        yield Claim(lock, notes)


def cannot_write(directory: Path, error: OSError) -> str:
    """Why a run cannot begin there, in a sentence."""
    return (
        f"{directory} cannot be written: {error.strerror or error} ({free_space(directory)}); set run.directory to "
        "another path"
    )


def _repair(directory: Path) -> list[str]:
    notes = []
    if (directory / earlier.REMOVED).is_dir():
        earlier.remove_rest(directory)
        notes.append(f"removed the rest of an earlier run in {directory}, whose removal was interrupted")
    if earlier.put_back(directory):
        where = f"; what that start wrote is in {directory / earlier.FAILED}"
        written = where if (directory / earlier.FAILED).is_dir() else ""
        notes.append(f"a start was interrupted that had moved the earlier run aside: {directory} is as before{written}")
    return notes


def _in_the_way(directory: Path) -> str:
    """What is no directory, of a path that should be one."""
    found = next(p for p in (directory, *directory.parents) if os.path.lexists(p) and not os.path.isdir(p))
    if not os.path.exists(found):
        return f"{directory} cannot be made: {found} is a link to {os.readlink(found)}, which is not there"
    return f"{directory} is a file" if found == directory else f"{directory} cannot be made: {found} is a file"


def _remove_empty(made: list[Path]) -> None:
    for path in made:  # the deepest first
        with contextlib.suppress(OSError):  # no longer empty, or gone
            path.rmdir()
