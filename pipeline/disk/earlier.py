"""An earlier run in the directory of a new one: moved aside, put back where the new one does not begin, removed last.

    RUN/.before          the earlier run, whole, while a new one starts in RUN
    RUN/.before.moving   the same on its way there or back: what stands beside it is of the earlier run too
    RUN/.removed         an earlier run that is being deleted
    RUN/failed           what the last start that came to no step had written, its logs above all

Everything is a rename within one directory, so no disk is crossed, and each state can be told after a crash: `put_back`
is what the next start begins with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.disk.lock import NAME as LOCK

ASIDE, MOVING, REMOVED, FAILED = ".before", ".before.moving", ".removed", "failed"
_OURS = (LOCK, ASIDE, MOVING, REMOVED, FAILED)


def names(path: Path) -> list[str]:
    """What of a directory is no part of this protocol."""
    return sorted(p.name for p in path.iterdir() if p.name not in _OURS and not p.name.startswith(f"{LOCK}."))


def has_begun(path: Path) -> bool:
    """Whether the run in a directory came to something: a recorded step, a complete checkpoint, or a model."""
    checkpoints = path / "checkpoints"
    saved = checkpoints.is_dir() and any(not p.name.startswith(".") for p in checkpoints.iterdir())
    return saved or (path / "hf").is_dir() or _has_row(path / "metrics.jsonl")


def _has_row(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        first = stream.readline()
    try:
        return first.endswith(b"\n") and "step" in json.loads(first)
    except ValueError:
        return False


def set_aside(path: Path) -> None:
    """Move the run that is there to .before."""
    moving = path / MOVING
    moving.mkdir()
    for name in names(path):
        (path / name).rename(moving / name)
    moving.rename(path / ASIDE)


def put_back(path: Path) -> bool:
    """Undo `set_aside`, wherever it was interrupted; what a new run has written goes to failed/. Whether there was
    something to put back."""
    if (path / ASIDE).is_dir():
        set_failed_aside(path)
        (path / ASIDE).rename(path / MOVING)
    if not (path / MOVING).is_dir():
        return False
    for entry in (path / MOVING).iterdir():
        entry.rename(path / entry.name)
    (path / MOVING).rmdir()
    return True


def set_failed_aside(path: Path) -> bool:
    """Move what a start that came to nothing has written to failed/, in the place of an earlier one. A start that had
    started no process has written nothing worth keeping: it is removed. Whether there is a failed/ then."""
    kept = (path / "logs").is_dir() and any((path / "logs").iterdir())
    if kept:
        shutil.rmtree(path / FAILED, ignore_errors=True)
        (path / FAILED).mkdir()
    for name in names(path):
        entry = path / name
        if kept:
            entry.rename(path / FAILED / name)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return kept


def remove(path: Path) -> None:
    """The new run has begun: the earlier one goes, and so does what a failed start left."""
    if (path / ASIDE).is_dir():
        (path / ASIDE).rename(path / REMOVED)  # never half of one under its name
    shutil.rmtree(path / FAILED, ignore_errors=True)
    remove_rest(path)


def remove_rest(path: Path) -> None:
    """Finish a removal that was interrupted."""
    shutil.rmtree(path / REMOVED, ignore_errors=True)
