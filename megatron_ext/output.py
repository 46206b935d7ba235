"""A directory that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class OutputError(RuntimeError):
    """The output cannot be written there; the message says what to do."""


@contextlib.contextmanager
def output_directory(path: Path, *, needed_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """An empty directory beside `path`, renamed to it at the end, removed where anything was raised.

    needed_bytes: what will be written; too little free space is found before the first byte.
    overwrite:    replace a directory that is there; otherwise it is an error. It stays until the new one is whole.
    Raises OutputError.
    """
    path = path.absolute()
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is already there; give another directory, or --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise OutputError(f"{path.parent} has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed")
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _to_disk(partial)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(directory: Path) -> None:
    """So that after a power cut the directory is not there with files that are not."""
    for file in directory.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
