"""One worker, as the supervisor that forked it has it: its two ends, the answers it was given, what it printed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.rewards import worker
from pipeline.rewards.protocol import Limits
from pipeline.rewards.registry import Component

KEPT_WORDS = 2000
"""Bytes of what it printed last that are kept."""


@dataclass
class Hired:
    """A worker.

    channel: questions go in, verdicts come out. output: what it prints.
    given:   the numbers and bytes of its answers; the first is being graded since `since`.
    closed:  since when its channel is, though it lives.
    printed: bytes since then.
    """

    process: int
    channel: socket.socket
    output: int
    since: float
    ready: bool = False
    closed: float | None = None
    given: deque[tuple[int, bytes]] = field(default_factory=deque)
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    printed: int = 0
    last_words: bytes = b""

    def give(self, number: int, packed: bytes) -> None:
        """One more answer, to be sent."""
        self.given.append((number, packed))
        self.outbox += packed

    def next_answer(self) -> None:
        """It begins with the first of `given` now."""
        self.since, self.printed, self.last_words = time.monotonic(), 0, b""

    def send(self) -> int:
        """What its channel takes of its answers; bytes that are left."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # one that has died is seen when it is reaped
            while self.outbox:
                del self.outbox[: self.channel.send(self.outbox)]
        return len(self.outbox)

    def read_output(self) -> bool:
        """Take what it has printed. False where no process can print any more."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return True
        self.printed += len(data)
        self.last_words = (self.last_words + data)[-KEPT_WORDS:]
        return bool(data)

    def said(self) -> str:
        """What it printed last, in one line, to stand behind what happened."""
        text = " ".join(self.last_words.decode("utf-8", "replace").split())
        return f"; it had printed {text[-500:]!r}" if text else ""

    def close(self) -> None:
        """Both ends."""
        self.channel.close()
        os.close(self.output)


def fork_worker(components: Sequence[Component], limits: Limits) -> Hired:
    """A new process that loads the verifiers and waits for answers."""
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    own = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            _close_all_but(theirs.fileno(), write)
            worker.serve(theirs, write, own, components, limits)
        except BaseException:  # whatever it is, this process must not go on as a supervisor
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    os.close(write)
    ours.setblocking(False)
    os.set_blocking(read, False)
    return Hired(process, ours, read, time.monotonic())


def _close_all_but(*kept: int) -> None:
    """A worker has its own ends and stderr only: an end that it held of another's would keep that one open."""
    signal.set_wakeup_fd(-1)
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, min(os.sysconf("SC_OPEN_MAX"), 1 << 20))
