"""A file of lines that only grows, and holds whole lines whatever the disk does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeline.disk.errors import DiskError, writing


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
        data = (line + "\n").encode()
        try:
            with writing(self.file):
                written = os.write(self._descriptor, data)
                while written < len(data):  # the disk took a part: the rest says why
                    written += os.write(self._descriptor, data[written:])
        except DiskError:
            with contextlib.suppress(OSError):  # read-only by now: the part cannot be taken back
                os.ftruncate(self._descriptor, here.st_size)
            raise

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
