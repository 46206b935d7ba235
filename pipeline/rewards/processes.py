"""What the kernel tells of processes, and how all of those that somebody started are ended.

A process whose parent dies becomes a child of its nearest ancestor that is a subreaper: so whatever it does to its
environment or its session, it is found below one that lives. A supervisor is one, and so is its guard: either ends
what runs below it when the other is killed. A mark in the environment, which is inherited, finds what is left where
both are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.forks import end_as

MARK = "SAMEROUTE_GRADER"
"""The variable that every process of a grader inherits; its value is the grader's own."""

DYING_S = 4.0
"""How long the end may take."""

_LOOK_S = 0.5  # between two looks at whether the driver lives
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


def fork_guarded(parent: int) -> int:
    """Returns in a fork, with the number of this process, which stays as its guard: it ends all that is below it as
    soon as the fork has ended, however that was, or `parent` has, and then ends as the fork did."""
    become_subreaper()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    guard = os.getpid()
    process = os.fork()
    if process == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        become_subreaper()
        return guard
    os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 1 << 20))  # what it held of the driver's would keep that open
    status = None
    while status is None and os.getppid() == parent:
        signal.sigtimedwait([signal.SIGCHLD], _LOOK_S)
        ended, code = os.waitpid(process, os.WNOHANG)
        status = code if ended else None
    end_below()
    return end_as(0 if status is None else os.waitstatus_to_exitcode(status))


def end_below() -> None:
    """Nothing below this process is left; in DYING_S seconds at most."""
    deadline = time.monotonic() + DYING_S
    while (found := below(os.getpid(), parents())) and time.monotonic() < deadline:
        kill(found)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)


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
