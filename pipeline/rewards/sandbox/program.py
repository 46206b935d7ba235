"""A program that a model wrote, what it may take, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

End = Literal["exited", "signal", "timeout", "output", "memory"]
"""How a program ended: by itself; of a signal (a limit of the kernel among them); took too long; printed too much; took
too much memory."""


class SandboxError(RuntimeError):
    """The sandbox failed, not the program: nothing is known of that."""


@dataclass(frozen=True)
class Program:
    """Python source, and what it reads from standard input."""

    source: str
    stdin: str = ""


@dataclass(frozen=True)
class SandboxLimits:
    """Of one program and all that it starts; the fields of `pipeline.config.rewards.SandboxConfig`."""

    cpu_s: int = 5
    wall_s: float = 10.0
    memory_mb: int = 512
    processes: int = 16
    files_mb: int = 32
    output_kb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    code: its exit code, or the signal that it died of; 0 where neither is known. stdout, stderr: what it printed, up to
    its limit. seconds: that it ran.
    """

    end: End
    code: int = 0
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def well(self) -> bool:
        """Whether it ended by itself, with code 0."""
        return self.end == "exited" and self.code == 0


class Sandbox(Protocol):
    """Runs programs, one at a time."""

    def run(self, program: Program, wall_s: float) -> Outcome:
        """Run one to its end, or for `wall_s` seconds. Raises SandboxError where the sandbox itself fails."""
        ...
