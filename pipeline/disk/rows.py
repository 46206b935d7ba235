"""A file of lines that only grows, and holds whole lines whatever the disk does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeline.disk.disk_errors import DiskError, writing


def append_whole(descriptor: int, data: bytes) -> None:
    """Add to the end of an open file, all of it, or raise OSError with the file as it was."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
        while written < len(data):  # the disk took a part: the rest says why
            written += os.write(descriptor, data[written:])
    except OSError:
        with contextlib.suppress(OSError):  # read-only by now: the part cannot be taken back
            os.ftruncate(descriptor, size)
        raise


class Rows:
    """Open for appending. A reader sees a line as soon as `append` returns, and never a part of one."""

    def __init__(self, file: Path):
        """Made where it is not there. Raises OSError."""
        self.file = file
        self._descriptor: int | None = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, line: str) -> None:
        """Raises DiskError, with the file as it was, where the disk does not take the line, and where the file is no
        longer at its path: what would be written then nobody could find."""
        assert self._descriptor is not None
        here = os.fstat(self._descriptor)
        try:
            there = os.stat(self.file)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(here, there):
            raise DiskError(f"{self.file} was removed or moved while the run wrote to it")
        with writing(self.file):
            append_whole(self._descriptor, (line + "\n").encode())

    def to_disk(self) -> None:
        """What is there survives a power cut. Raises DiskError."""
        assert self._descriptor is not None
        with writing(self.file):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
