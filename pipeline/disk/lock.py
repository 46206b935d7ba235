"""RUN/.lock: one run at a time in a directory, on any file system that creates a file once (NFS and Lustre do).

The file names its owner, and its owner touches it every few seconds. Whoever finds it

- sees on the same machine whether the owner lives: a `kill -9` blocks nobody;
- waits on another machine for a touch: without one the owner is gone. No clocks are compared, only two looks.

An owner whose lock was taken or removed meanwhile (it was stopped for long, somebody deleted the directory) sees that,
and ends its run in place of writing into another's.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.disk.disk_errors import DiskError, RunDirectoryError
from pipeline.disk.owner import Owner

NAME = ".lock"
BEAT_S = 5.0  # from one touch to the next
_WRITTEN_S = 2.0  # from making the file to the name in it, on a slow file server
SILENT_S = 30.0  # without a touch, an owner that cannot be seen is gone


class Lock:
    """A held lock. Made by `hold`."""

    def __init__(self, file: Path, owner: Owner):
        self.file, self.owner = file, owner
        self._lost: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sameroute lock", daemon=True)

    def check(self) -> None:
        """Raises DiskError where the lock is no longer this process's."""
        self._look()
        if self._lost is not None:
            raise DiskError(self._lost)

    def _look(self) -> None:
        found = Owner.read(self.file)
        if found is None and not self.file.exists():
            self._lost = f"{self.file.parent} was removed or moved while the run wrote there"
        elif found is not None and found.token != self.owner.token:
            self._lost = f"another run has taken {self.file.parent}: {found}"

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S) and self._lost is None:
            with contextlib.suppress(OSError):  # a file server that is away for a while; the next look says more
                self._look()
                os.utime(self.file)

    def _release(self) -> None:
        self._over.set()
        self._thread.join()
        found = Owner.read(self.file)
        if found is not None and found.token == self.owner.token:
            self.file.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(directory: Path, say: Callable[[str], None]) -> Iterator[Lock]:
    """The lock of an existing directory, while the block lasts. say: is told what a wait is for.

    Raises RunDirectoryError, naming the owner, where a run that lives has it.
    """
    file, owner = directory / NAME, Owner.this_process()
    while not _created(file, owner):
        found = _read(file)
        if _lives(file, found, say):
            raise RunDirectoryError(_held(directory, found))
        _remove(file, found, say)
    lock = Lock(file, owner)
    lock._thread.start()
    try:
        yield lock
    finally:
        lock._release()


def refuse_held(directory: Path) -> None:
    """Raises RunDirectoryError where a run of this machine holds the directory; looks, and touches nothing."""
    try:
        found = Owner.read(directory / NAME)
    except OSError:  # what is wrong with the place is said by whoever wants to write there
        return
    if found is not None and found.here and found.alive:
        raise RunDirectoryError(_held(directory, found))


def _held(directory: Path, owner: Owner | None) -> str:
    who = owner or "an owner that did not write its name"
    return f"a run is going on in {directory}: {who}; wait for its end, or set run.directory to another path" + (
        "" if owner is not None and owner.here else f". If that run is gone, remove {directory / NAME}"
    )


def _created(file: Path, owner: Owner) -> bool:
    """Make the lock; False where there is one."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, owner.text().encode())
    except OSError:  # a full disk: a lock without a name would stop the next run for a while
        file.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _lives(file: Path, owner: Owner | None, say: Callable[[str], None]) -> bool:
    if owner is not None and owner.here:
        return owner.alive
    first, end = _touched(file), time.monotonic() + SILENT_S
    say(f"{file} is of {owner or 'an unknown process'}: waiting {SILENT_S:g} s at most for a sign of life")
    while first is not None and time.monotonic() < end:
        time.sleep(BEAT_S / 5)
        if (now := _touched(file)) is not None and now != first:
            return True
        if now is None:
            return False
    return False


def _touched(file: Path) -> tuple[int, int] | None:
    """What changes when the owner does. It is opened for that: NFS then asks its server."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read(file: Path) -> Owner | None:
    """The owner; one that has just made the file has a moment to write its name."""
    end = time.monotonic() + _WRITTEN_S
    while (owner := Owner.read(file)) is None and file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return owner


def _remove(file: Path, dead: Owner | None, say: Callable[[str], None]) -> None:
    """Take the lock of a dead owner away.

    Several may have found it dead. The right to remove it is a file named after its token, that one of them makes; so
    what is removed is that lock, and never the one that a quicker one has made in its place.
    """
    right = file.with_name(f"{NAME}.{dead.token if dead is not None else 'unknown'}")
    if not _created(right, Owner.this_process()):
        other, made = _read(right), _touched(right)
        # Who made it has removed it meanwhile, or died right there.
        if made is not None and not _lives(right, other, say) and (Owner.read(right), _touched(right)) == (other, made):
            right.unlink(missing_ok=True)
        time.sleep(0.02)
        return
    try:
        if Owner.read(file) == dead:
            file.unlink(missing_ok=True)
    finally:
        right.unlink(missing_ok=True)
