"""What the kernel tells of processes, and how all of those that somebody started are ended.

Two ways to find them, because each has a hole. A process whose parent dies becomes a child of its nearest ancestor
that is a subreaper: that finds what runs below a living supervisor, whatever it did to its environment or its session.
A mark in the environment is inherited: that finds what is left where the supervisor itself was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

MARK = "SAMEROUTE_GRADER"
"""The variable that every process of a grader inherits; its value is the grader's own."""

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Orphans below this process become its children."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """This process is killed when its parent, a process of one thread, ends."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def parents() -> dict[int, int]:
    """Process -> its parent, of all that live; zombies are left out."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    found[int(entry)] = int(parent)
    return found


def below(root: int, parent_of: dict[int, int]) -> list[int]:
    """All descendants of a process, itself left out."""
    children: dict[int, list[int]] = {}
    for process, parent in parent_of.items():
        children.setdefault(parent, []).append(process)
    found, open_ = [], [root]
    while open_:
        own = children.get(open_.pop(), [])
        found += own
        open_ += own
    return found


def own_memory(process: int) -> int:
    """Bytes of resident memory that are not shared with a file; 0 for one that has ended."""
    try:
        _, resident, shared = Path(f"/proc/{process}/statm").read_text().split()[:3]
    except OSError:  # gone meanwhile
        return 0
    return (int(resident) - int(shared)) * _PAGE


def kill(processes: Iterable[int]) -> None:
    """All at once: stopped first, so that none starts another while the others are killed."""
    processes = list(processes)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def marked(value: str) -> list[int]:
    """The living processes whose environment carries this mark, the caller left out."""
    wanted, found = f"{MARK}={value}".encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's; a zombie's is empty
                if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return found


def kill_marked(value: str, *, timeout_s: float = 5.0) -> None:
    """Kill all processes that carry a mark. Raises TimeoutError where one is still there after timeout_s seconds."""
    deadline = time.monotonic() + timeout_s
    while left := marked(value):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} survived SIGKILL for {timeout_s} s")
        kill(left)
        time.sleep(0.01)
