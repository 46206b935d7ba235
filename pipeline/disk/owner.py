"""Which process owns something on a disk, and whether that process lives.

A process id alone does not say it: ids are given again. With the boot of the machine, the process-id namespace (each
container has its own) and the moment of its start, in ticks since boot, a process is named once and for all. Only a
process of the same boot and namespace can look whether it lives.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process. since: when it began to own, for people. token: names this one ownership."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        """A new ownership by the caller's process."""
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, file: Path) -> Owner | None:
        """None for a file that is away, or not yet written whole."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def text(self) -> str:
        """As `read` takes it."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @property
    def here(self) -> bool:
        """Whether the caller can see whether it lives."""
        return (self.boot, self.namespace) == (_boot(), _namespace())

    @property
    def alive(self) -> bool:
        """Whether it lives; a zombie does not. Only where it is `here`."""
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _started(pid: int) -> int | None:
    """Ticks since boot; None for a process that is gone, or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name in front may hold anything
    return None if state in "ZX" else int(fields[18])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
