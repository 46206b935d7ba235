"""All processes of one server, found by a mark that they inherit, and what they leave behind.

A process tree cannot be followed by parent ids or sessions once a process in the middle has died or has called
`setsid`. The environment is inherited whatever happens, so every server gets a token in a variable of its own.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import psutil

TOKEN_VARIABLE = "SAMEROUTE_SERVER_TOKEN"
_SHARED_MEMORY = Path("/dev/shm")


def processes_of(token: str) -> list[psutil.Process]:
    """The living processes whose environment carries `token`."""
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # Not psutil.Process.environ: it parses every variable. A zombie's environment is empty.
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(int(entry.name)))
        except (OSError, psutil.NoSuchProcess):  # gone meanwhile, or another user's
            continue
    return found


def shared_memory_of(token: str) -> set[Path]:
    """The files of /dev/shm that the server's processes have mapped."""
    prefix = f"{_SHARED_MEMORY}/"
    files = set()
    for process in processes_of(token):
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:  # gone meanwhile
            continue
        files |= {line[line.index(prefix) :] for line in lines if prefix in line}
    return {Path(file) for file in files if not file.endswith(" (deleted)")}


def remove_files(scratch: Path, shared_memory: set[Path]) -> None:
    """Its folder and its shared memory; what is open there stays open."""
    for path in shared_memory:
        path.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def remove_server(token: str, scratch: Path, shared_memory: set[Path], *, timeout_s: float = 10.0) -> None:
    """Kill every process of the server but the caller's own, then remove its shared memory and its folder.

    scratch: the folder that the server had as TMPDIR: its sockets stand there.
    shared_memory: what `shared_memory_of` said while the server lived; what is mapped now is added.
    Raises TimeoutError when a process is still there after `timeout_s` seconds.
    """
    shared_memory = shared_memory | shared_memory_of(token)
    deadline = time.monotonic() + timeout_s
    while remaining := [process for process in processes_of(token) if process.pid != os.getpid()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {[p.pid for p in remaining]} survived SIGKILL for {timeout_s} s")
        for process in remaining:  # in every round: one of them may have started another meanwhile
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(remaining, timeout=0.2)
    remove_files(scratch, shared_memory)
