"""A command from its start to its end, with eyes on what the kernel does not limit: time, output, memory together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.rewards.processes import kill
from pipeline.rewards.sandbox.program import End, Outcome, SandboxLimits

_LOOK_S = 0.05
"""How often all its processes are looked at."""

_MODEST_S = 0.25
"""A program that still runs then goes behind those that have just begun: an endless loop costs the others little."""

_GONE_S = 5.0
"""How long killed processes may take to go."""


@dataclass(frozen=True)
class Command:
    """What is started. pass_fds: descriptors that it inherits."""

    words: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: Sequence[int] = ()


def run_watched(command: Command, stdin: bytes, limits: SandboxLimits, wall_s: float) -> Outcome:
    """Run it to its end, or to a limit; then nothing of it is left."""
    start = time.monotonic()
    process = subprocess.Popen(
        command.words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(command.environment),
        pass_fds=command.pass_fds,
        start_new_session=True,
    )
    watch = _Watch(process, stdin, limits, start + wall_s)
    try:
        end = watch.until_the_end()
    finally:
        watch.close()
    code = process.returncode
    texts = [bytes(part).decode("utf-8", "replace") for part in watch.printed]
    ended: End = end or ("signal" if code < 0 else "exited")
    return Outcome(ended, abs(code) if end is None else 0, *texts, seconds=time.monotonic() - start)


class _Watch:
    """One process, its three pipes and its descendants."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes, limits: SandboxLimits, deadline: float):
        self.process, self.limits, self.deadline = process, limits, deadline
        self.left = memoryview(stdin)
        self.printed = (bytearray(), bytearray())
        self.selector = selectors.DefaultSelector()
        self.ended = os.pidfd_open(process.pid)
        self.selector.register(self.ended, selectors.EVENT_READ)
        assert process.stdin is not None
        self.outputs = [pipe for pipe in (process.stdout, process.stderr) if pipe is not None]
        for pipe in (process.stdin, *self.outputs):
            os.set_blocking(pipe.fileno(), False)
        for pipe, kept in zip(self.outputs, self.printed, strict=True):
            self.selector.register(pipe, selectors.EVENT_READ, kept)
        self.selector.register(process.stdin, selectors.EVENT_WRITE)

    def until_the_end(self) -> End | None:
        """Which limit it came to; None where it ended by itself."""
        began = time.monotonic()
        modest, next_look = False, began + _LOOK_S
        while True:
            now = time.monotonic()
            if now >= self.deadline:
                return "timeout"
            ended = False
            for key, _ in self.selector.select(max(0.0, min(self.deadline, next_look) - now)):
                if key.fd == self.ended:
                    ended = True
                elif key.fileobj is self.process.stdin:
                    self._write()
                else:
                    self._read(key)
            if ended:
                for key in list(self.selector.get_map().values()):
                    if key.fileobj in self.outputs:
                        self._read(key)
            if sum(map(len, self.printed)) > self.limits.output_kb * 1000:
                return "output"
            if ended:
                return None
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_S
                family = descendants(self.process.pid)
                if sum(map(_memory, family)) > self.limits.memory_mb * 1_000_000:
                    return "memory"
                if not modest and time.monotonic() - began > _MODEST_S:
                    modest = True
                    _behind_others(family)

    def _write(self) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        try:
            while self.left:
                self.left = self.left[os.write(pipe.fileno(), self.left[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it reads no more
            pass
        self.selector.unregister(pipe)
        pipe.close()

    def _read(self, key: selectors.SelectorKey) -> None:
        """What has been printed, and a little more than the limit at most."""
        most = self.limits.output_kb * 1000 + 1
        with contextlib.suppress(BlockingIOError):
            while len(key.data) < most:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    self.selector.unregister(key.fileobj)
                    return
                key.data.extend(data)

    def close(self) -> None:
        """Kill what is left: the process's own descendants, and its session where one has left them."""
        self.selector.close()
        os.close(self.ended)
        deadline = time.monotonic() + _GONE_S
        family = [self.process.pid, *descendants(self.process.pid)] if self.process.poll() is None else []
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        kill(family)
        self.process.wait()
        while any(Path(f"/proc/{p}").exists() and not _is_zombie(p) for p in family) and time.monotonic() < deadline:
            time.sleep(0.002)
        for pipe in (self.process.stdin, *self.outputs):
            if pipe is not None:
                pipe.close()


def descendants(process: int) -> list[int]:
    """All that a process has started and that still runs, from the kernel's own lists of children."""
    found, open_ = [], [process]
    while open_:
        own = open_.pop()
        with contextlib.suppress(OSError):  # gone meanwhile
            for task in os.listdir(f"/proc/{own}/task"):
                children = [int(p) for p in Path(f"/proc/{own}/task/{task}/children").read_text().split()]
                found += children
                open_ += children
    return found


def _memory(process: int) -> int:
    """Bytes in memory that no file stands behind, files in memory included."""
    total = 0
    with contextlib.suppress(OSError):  # gone meanwhile
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def _behind_others(family: Sequence[int]) -> None:
    for process in family:
        with contextlib.suppress(OSError):  # gone meanwhile
            os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
