"""Programs in namespaces of this machine, made by bubblewrap: no network, no files but a Python and an own folder in
memory, no process but its own, no environment.

As root, bubblewrap makes the namespaces as root and each program runs under a user number of its own that nobody else
has: the kernel never limits the processes of root. As any other user it makes a user namespace. Limits of the kernel
are set behind the namespaces, by util-linux's prlimit; what it does not limit, `watched` looks at.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.rewards.sandbox.program import Outcome, Program, SandboxError, SandboxLimits
from pipeline.rewards.sandbox.seccomp import seccomp_filter
from pipeline.rewards.sandbox.watched import Command, run_watched

LEAST_VERSION = (0, 8)
_HOME = "/work"
_PROGRAM = f"{_HOME}/main.py"
_SYSTEM = ("/usr", "/usr/local")
_DESCRIPTORS = 64
_LIBRARIES_MB = 512
"""Address space beyond the memory: of code and of what is reserved and never touched."""


class Bubblewrap:
    """A sandbox. python: the interpreter of programs; None: this process's own, without its packages."""

    def __init__(self, limits: SandboxLimits, python: Path | None = None):
        self.limits = limits
        self.python, self.prefix = _interpreter(python)

    def run(self, program: Program, wall_s: float) -> Outcome:
        """Run one to its end, or for `wall_s` seconds. Raises SandboxError where bubblewrap fails."""
        with (
            _in_memory(program.source.encode("utf-8", "surrogateescape")) as source,
            _in_memory(seccomp_filter() or b"") as calls,
            _in_memory(b"") as status,
        ):
            words = self._words(source, calls, status)
            command = Command(words, {}, pass_fds=(source, calls, status))
            outcome = run_watched(command, program.stdin.encode("utf-8", "surrogateescape"), self.limits, wall_s)
            if outcome.end in ("timeout", "output", "memory"):
                return outcome
            code = _exit_code(status)
        if code is None:
            said = " ".join(outcome.stderr.split())[-300:]
            raise SandboxError(f"bubblewrap ended with {outcome.end} {outcome.code}: {said}")
        if code > 128:
            return Outcome("signal", code - 128, outcome.stdout, outcome.stderr, outcome.seconds)
        return Outcome("exited", code, outcome.stdout, outcome.stderr, outcome.seconds)

    def _words(self, source: int, calls: int, status: int) -> list[str]:
        limits = self.limits
        own = str(limits.files_mb * 1_000_000)
        words = ["bwrap", *_namespaces(), "--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
        for name, value in _environment().items():
            words += ["--setenv", name, value]
        words += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64", "lib32", "sbin"):
            if Path(f"/{name}").is_symlink():
                words += ["--symlink", f"usr/{name}", f"/{name}"]
            elif Path(f"/{name}").is_dir():
                words += ["--ro-bind", f"/{name}", f"/{name}"]
        words += _bound(self.prefix)
        words += ["--proc", "/proc", "--dev", "/dev", "--size", own, "--perms", "1777", "--tmpfs", "/dev/shm"]
        words += ["--remount-ro", "/dev", "--size", own, "--perms", "1777", "--tmpfs", _HOME]
        words += ["--symlink", _HOME.removeprefix("/"), "/tmp", "--remount-ro", "/", "--chdir", _HOME]
        words += ["--perms", "0444", "--ro-bind-data", str(source), _PROGRAM, "--json-status-fd", str(status)]
        if seccomp_filter() is not None:
            words += ["--seccomp", str(calls)]
        return [*words, "--", *_limited(limits), str(self.python), "-I", "-B", _PROGRAM]


def why_not() -> str | None:
    """What to do before this machine has such sandboxes; None where it has."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed: apt-get install bubblewrap"
    for tool in ("prlimit", "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install util-linux"
    said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout.split()
    version = tuple(int(part) for part in said[-1].split(".")[:2]) if said and said[-1][0].isdigit() else (0, 0)
    if version < LEAST_VERSION:
        return f"bubblewrap {'.'.join(map(str, version))} is too old: install 0.8 or a later one"
    return None


def _namespaces() -> list[str]:
    apart = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if _own_number() is not None:
        return apart
    return [*apart, "--unshare-user", "--disable-userns"]


@functools.cache
def _own_number() -> int | None:
    """As root, the user number of the programs of this process; None for other users, who have one only."""
    if os.geteuid() != 0:
        return None
    ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    start, _, count = max(ranges, key=lambda r: r[2])
    if count < 65536:  # root of a container that has no other users
        return None
    half = min(count, 4_000_000_000) // 2
    return start + half + os.getpid() % min(half, 1_000_000)


def _limited(limits: SandboxLimits) -> list[str]:
    """The words that set the limits of the kernel, and the user."""
    memory, files = limits.memory_mb * 1_000_000, limits.files_mb * 1_000_000
    kernel = {
        "as": memory + _LIBRARIES_MB * 1_000_000,
        "core": 0,
        "cpu": limits.cpu_s,
        "fsize": files,
        "nofile": _DESCRIPTORS,
        "nproc": limits.processes,
        "msgqueue": 0,
        "memlock": 1 << 20,
    }
    words = ["prlimit", *(f"--{name}={value}:{value}" for name, value in kernel.items()), "--"]
    number = _own_number()
    if number is not None:
        words += ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", "--"]
    return words


def _environment() -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": _HOME,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }


def _interpreter(python: Path | None) -> tuple[Path, Path]:
    """The interpreter, and the folder that it needs."""
    if python is None:
        return Path(os.path.realpath(sys.executable)), Path(sys.base_prefix).resolve()
    say = "import os, sys; print(os.path.realpath(sys.executable)); print(sys.prefix)"
    try:
        done = subprocess.run([python, "-I", "-c", say], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"{python} is no Python that runs: {error}") from error
    return python.absolute(), Path(done.stdout.split("\n")[1])


def _bound(prefix: Path) -> list[str]:
    """The folder of a Python under its own name, read only; its parents show nothing else."""
    if str(prefix) in _SYSTEM:
        return []
    words: Sequence[str] = [
        word for parent in list(prefix.parents)[-2::-1] for word in ("--perms", "0755", "--dir", str(parent))
    ]
    return [*words, "--ro-bind", str(prefix), str(prefix)]


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A file without a name, to be read from its beginning."""
    descriptor = os.memfd_create("sandbox")
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _exit_code(status: int) -> int | None:
    """Of the program, as bubblewrap has written it; None where it has not come so far."""
    text = os.pread(status, 1 << 16, 0).decode()
    for line in text.splitlines():
        if (code := json.loads(line).get("exit-code")) is not None:
            return int(code)
    return None
