"""A worker: a process that does nothing but ask verifiers, answer after answer, on its main thread.

It trusts a verifier with its own life only. What it cannot notice itself (time, memory, output, its own death) the
supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import io
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.rewards.processes import become_subreaper, die_with, parents
from pipeline.rewards.protocol import (
    LARGEST,
    READY,
    REFUSED,
    Limits,
    Verdict,
    component_of,
    pack,
    pack_verdict,
    questions_in,
    unpack_question,
)
from pipeline.rewards.registry import Component, Verifier, VerifierError, describe, is_quick, load

MUTE = 70
"""The exit code of a worker that can no longer speak to the supervisor."""


def serve(
    channel: socket.socket, output: int, supervisor: int, components: Sequence[Component], limits: Limits
) -> None:
    """Grade what comes through the channel until it closes; never returns.

    output: where stdout and stderr go. supervisor: the process that forked this one, and that it ends with.
    """
    _settle(output, supervisor)
    own = os.getpid()
    try:
        verifiers = [load(component) for component in components]
        message = pack(0, READY)
    except VerifierError as error:
        verifiers, message = [], pack(0, REFUSED, text=str(error))
    _must_be(own)
    _say(channel, message)
    if not verifiers:
        os._exit(1)
    started = None if all(map(is_quick, components)) else _Started()
    buffer = bytearray()
    while data := channel.recv(1 << 18):
        buffer += data
        verdicts = bytearray()
        for number, packed in questions_in(buffer):
            verdict = _ask(verifiers[component_of(packed)], packed)
            if started is None:
                verdicts += pack_verdict(number, verdict)
                continue
            _must_be(own)
            left = started.left(limits.grace_s)
            if left is not None and verdict.kind is None:
                verdict = Verdict(kind="left_behind", what=left)
            # At once: where the next answer kills this process, the supervisor knows which one it was.
            _say(channel, pack_verdict(number, verdict))
        if verdicts:
            _say(channel, verdicts)
    os._exit(0)


def _say(channel: socket.socket, message: bytes | bytearray) -> None:
    try:
        channel.sendall(message)
    except OSError:  # the verifier has closed it
        os._exit(MUTE)


def _settle(output: int, supervisor: int) -> None:
    """Of what was inherited, keep nothing that a verifier could do harm with."""
    die_with(supervisor)
    become_subreaper()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  for the life of the process
    sys.stdout = _text(1)
    sys.stderr = _text(2)
    gc.enable()


def _text(descriptor: int) -> io.TextIOWrapper:
    """Lines leave at once: what a verifier prints before it dies is not lost."""
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _must_be(process: int) -> None:
    """A verifier may fork, and let both come back here: only the worker itself goes on."""
    if os.getpid() != process:
        os._exit(0)


def _ask(verifier: Verifier, packed: bytes) -> Verdict:
    """What a verifier says of one answer."""
    try:
        value: Any = verifier(unpack_question(packed))
        if inspect.isawaitable(value):
            value = asyncio.run(_awaited(value))
        return _checked(value)
    except SystemExit as error:
        return Verdict(kind="exited", what=f"called sys.exit({error.code!r})")
    except MemoryError as error:
        return Verdict(kind="memory", what=f"raised {describe(error)}")
    except BaseException as error:  # a user's own function, which may raise anything; KeyboardInterrupt too
        return Verdict(kind="raised", what=f"raised {describe(error)}")


async def _awaited(value: Any) -> Any:
    return await value


def _checked(value: Any) -> Verdict:
    reward = math.nan
    if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        with contextlib.suppress(OverflowError):  # an integer beyond float64
            reward = float(value)
    if abs(reward) <= LARGEST:  # which NaN is not
        return Verdict(reward=reward)
    return Verdict(kind="not_a_number", what=f"returned {_shown(value)}, which is no finite number of float32")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # a class of the user's, or an integer of more digits than Python prints
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) < 200 else f"{text[:200]}..."


class _Started:
    """What the verifier has started and left running since it was imported."""

    def __init__(self):
        self.threads = set(threading.enumerate())
        self.children = {process for process, parent in parents().items() if parent == os.getpid()}

    def left(self, grace_s: float) -> str | None:
        """What is still there after grace_s seconds, in words; None for nothing."""
        deadline = time.monotonic() + grace_s
        while (what := self._processes() or self._threads()) is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        return what

    def _threads(self) -> str | None:
        if threading.active_count() <= len(self.threads):
            return None
        names = sorted(t.name for t in set(threading.enumerate()) - self.threads)
        if not names:
            return None
        return f"returned and left a thread running ({', '.join(names)[:200]}); join it, or start it at import"

    def _processes(self) -> str | None:
        """Orphans of what it started are among them: this process is a subreaper."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # ended, and nobody has asked how
                pass
        except ChildProcessError:  # there is none: the usual case, at the cost of one call
            return None
        mine = {process for process, parent in parents().items() if parent == os.getpid()}
        left = sorted(mine - self.children - _of_multiprocessing())
        if not left:
            return None
        return f"returned and left a process running ({', '.join(map(str, left))[:200]}); wait for it, or kill it"


def _of_multiprocessing() -> set[int]:
    """The two processes that Python's own multiprocessing keeps for the next call."""
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    return {getattr(tracker, "_pid", None) or 0, getattr(server, "_forkserver_pid", None) or 0}
