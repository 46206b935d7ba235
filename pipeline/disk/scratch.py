"""The run's temporary folder, one, that only its user can enter: /tmp/sameroute-abcdefgh.

TMPDIR of this process and of all that it starts, so that what Ray, SGLang, torch and whatever they import leave behind
is in it and goes with it, whatever way the run ends. After a `kill -9` of this process the next start removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.disk.disk_errors import RunDirectoryError
from pipeline.disk.owner import Owner

PREFIX = "sameroute-"
_OWNER = "owner.json"
_LONGEST = 30  # bytes of its path: behind it Ray's sockets need 75 of 107
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """The folder, while the block lasts; inside another such block, that one's. Folders of runs that were killed are
    removed first.

    Where TMPDIR says, or in /tmp or the like where that is too long for sockets. Raises RunDirectoryError where none of
    these can be written.
    """
    if (Path(tempfile.gettempdir()) / _OWNER).is_file():
        yield Path(tempfile.gettempdir())
        return
    before = os.environ.get("TMPDIR")
    parents = [tempfile.gettempdir(), *_SHORT]
    remove_abandoned(parents)
    folder = _made(parents)
    (folder / _OWNER).write_text(Owner.this_process().text(), encoding="utf-8")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = None  # looked up again
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _made(parents: list[str]) -> Path:
    for parent in parents:
        if len(os.fsencode(parent)) + 1 + len(PREFIX) + 8 <= _LONGEST and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 700
    raise RunDirectoryError(f"none of {', '.join(parents)} can be written, or is short enough for sockets; set TMPDIR")


def remove_abandoned(parents: list[str]) -> list[Path]:
    """Remove the folders of this user's runs whose process is gone; returns them. Those of another container on the
    same disk, whose processes cannot be seen from here, stay."""
    removed = []
    for folder in sorted({f for parent in parents for f in Path(parent).glob(f"{PREFIX}*")}):
        try:
            mine = folder.stat().st_uid == os.getuid()
            owner = Owner.read(folder / _OWNER) if mine else None
        except OSError:  # it goes while we look
            continue
        if owner is not None and owner.here and not owner.alive:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed
