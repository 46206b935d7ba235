"""Programs as plain processes of this user: within limits, but with all files and the network. For a machine that holds
nothing else, and only where `mode: unsafe` says so."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipeline.rewards.sandbox.program import Outcome, Program, SandboxLimits
from pipeline.rewards.sandbox.watched import Command, run_watched


class Unsafe:
    """No sandbox. python: the interpreter of programs; None: this process's own."""

    def __init__(self, limits: SandboxLimits, python: Path | None = None):
        self.limits, self.python = limits, str(python or sys.executable)

    def run(self, program: Program, wall_s: float) -> Outcome:
        """Run one to its end, or for `wall_s` seconds."""
        limits = self.limits
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "main.py"
            file.write_text(program.source, encoding="utf-8", errors="surrogateescape")
            kernel = {"core": 0, "cpu": limits.cpu_s, "fsize": limits.files_mb * 1_000_000}
            words = ["prlimit", *(f"--{name}={value}:{value}" for name, value in kernel.items()), "--"]
            words += ["env", f"--chdir={folder}", self.python, "-I", "-B", str(file)]
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8"}
            stdin = program.stdin.encode("utf-8", "surrogateescape")
            return run_watched(Command(words, environment), stdin, limits, wall_s)
