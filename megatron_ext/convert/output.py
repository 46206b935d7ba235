"""A directory that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_ext.convert.comparison import Advance


class OutputError(RuntimeError):
    """The output cannot be written there; the message says what to do."""


def size_text(nbytes: float) -> str:
    """In the unit that leaves it between 1 and 1,000: "512 bytes", "3.6 MB", "61.1 GB"."""
    if nbytes < 1000:
        return f"{nbytes:g} bytes"
    size, unit = next(((s, u) for s, u in ((1e3, "kB"), (1e6, "MB")) if nbytes / s < 999.95), (1e9, "GB"))
    return f"{nbytes / size:,.1f} {unit}"


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
        raise OutputError(f"{path.parent} has {size_text(free)} free, {size_text(needed_bytes)} are needed")
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        with _on_its_way(partial):
            yield partial
        _to_disk(partial)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _on_its_way(directory: Path) -> Iterator[None]:
    """What is written goes to the disk in the meantime: left to itself, the kernel waits until there is a lot.

    Raises at the end what could not be written.
    """
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.2):
            _to_disk(directory)

    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(follow)
        try:
            yield
        finally:
            done.set()
    following.result()


def _to_disk(directory: Path) -> None:
    """So that after a power cut the directory is not there with files that are not."""
    for file in directory.rglob("*"):
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:  # renamed since
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_apart(source: Path, out: Path) -> None:
    """An output never replaces, holds or lies in what it is made from."""
    source, out = source.resolve(), out.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise OutputError(f"{out} and {source}, which is read, lie in one another; give another directory")


@contextlib.contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Advance]:
    """A bar on standard error. total: bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(what, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)
