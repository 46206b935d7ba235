"""Where processes of a machine stand: the Python stacks of their threads, read from outside by py-spy.

A process answers no signal while it is stopped, nor a call while it hangs in a collective of C++; its memory can be
read all the same. py-spy neither stops nor changes it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READ_S = 20.0
_STATES = {"R": "running", "S": "sleeping", "D": "in the kernel", "T": "stopped", "t": "stopped", "Z": "dead"}


@dataclass(frozen=True)
class Frame:
    """A line of Python that is being run."""

    function: str
    file: str
    line: int

    @property
    def name(self) -> str:
        """Of the function, without those that it is defined in."""
        return self.function.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(self.file.strip('/').split('/')[-3:])}:{self.line})"


@dataclass(frozen=True)
class Thread:
    """frames: the innermost first."""

    name: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class ProcessStacks:
    """One process. state: running, sleeping, in the kernel, stopped, dead, or gone. command: as ps shows it.
    problem: why its threads could not be read; empty where they were."""

    pid: int
    state: str
    command: str
    threads: tuple[Thread, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        lines = [f"process {self.pid}, {self.state}: {self.command}"]
        lines += [f"  its threads cannot be read: {self.problem}"] if self.problem else []
        for thread in self.threads:
            lines += [f"  thread {thread.name or '(without a name)'}", *(f"    {frame}" for frame in thread.frames)]
        return "\n".join(lines)


def stacks_of(pids: Sequence[int]) -> list[ProcessStacks]:
    """Of processes on this machine, in their order."""
    with ThreadPoolExecutor(max_workers=min(8, max(1, len(pids)))) as readers:
        return list(readers.map(_of_process, pids))


def _of_process(pid: int) -> ProcessStacks:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ProcessStacks(pid, "gone", "")
    letter = stat.rpartition(")")[2].split()[0]
    seen = ProcessStacks(pid, _STATES.get(letter, letter), command[:200])
    if letter == "Z":
        return seen
    reader = Path(sys.executable).with_name("py-spy")
    order = [str(reader) if reader.exists() else "py-spy", "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        done = subprocess.run(order, capture_output=True, text=True, timeout=_READ_S, check=False)
        threads = _threads(json.loads(done.stdout)) if done.returncode == 0 else ()
        problem = " ".join(done.stderr.split())[-300:] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        threads, problem = (), f"py-spy: {error}"
    return ProcessStacks(seen.pid, seen.state, seen.command, threads, problem)


def _threads(found: Sequence[dict[str, Any]]) -> tuple[Thread, ...]:
    return tuple(
        Thread(
            thread.get("thread_name") or "",
            tuple(Frame(frame["name"], frame["filename"], frame["line"]) for frame in thread["frames"]),
        )
        for thread in found
    )
