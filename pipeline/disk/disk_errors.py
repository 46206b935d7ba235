"""A disk that does not take what a run writes: one sentence with the path and the free space."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import NOT_STARTED, SamerouteError

# What a disk, a quota or a removed directory answers, as opposed to a socket or a process.
_OF_A_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ENAMETOOLONG,
}
_FREE = "are free there"
_IN_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors tells it


class DiskError(SamerouteError):
    """A file of the run was not written; the message says which, why, and how much space is free."""


class RunDirectoryError(SamerouteError):
    """The run directory cannot be used; the message says what to write instead. Nothing was started."""

    exit_code = NOT_STARTED


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file: an OSError becomes a DiskError."""
    try:
        yield
    except OSError as error:
        raise DiskError(not_written(path, error)) from error


def not_written(path: Path, error: OSError) -> str:
    """The sentence. path: counts where the error names none."""
    file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    return f"{file} was not written: {error.strerror or error} ({free_space(file)})"


def free_space(path: Path) -> str:
    """Of the disk that a path is on, or would be."""
    # os.path.exists, and not Path's: that raises where a folder on the way may not be entered
    there = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p))
    usage = shutil.disk_usage(there)
    return f"{_size(usage.free)} of {_size(usage.total)} {_FREE}"


def of_the_disk(error: BaseException, directory: Path) -> DiskError | None:
    """An error of the disk that holds `directory`, in a sentence; None for any other error."""
    if isinstance(error, OSError) and error.errno in _OF_A_DISK:
        named = error.filename if isinstance(error.filename, str | bytes) else None
        if named is None or Path(os.fsdecode(named)).absolute().is_relative_to(directory.absolute()):
            return DiskError(not_written(directory, error))
    elif type(error).__name__ == "SafetensorError" and (found := _IN_RUST.search(str(error))):
        number = int(found[1])
        return DiskError(not_written(directory, OSError(number, os.strerror(number))))
    elif any(os.strerror(n) in str(error) for n in (errno.ENOSPC, errno.EDQUOT)) and _FREE not in str(error):
        return DiskError(f"{error} ({free_space(directory)})")  # of a rank, whose OSError is only told
    return None


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
