"""Machines on this machine: processes in namespaces of their own, which end together. Only root may make them."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KINDS = ("--net", "--uts", "--mount", "--pid")


def unshared(*script: str | Path) -> list[str | Path]:
    """The command of a bash script as the first process of new namespaces; all in them end with it."""
    return ["unshare", *_KINDS, "--fork", "--kill-child", "--mount-proc", "bash", *script]


def inside(pid: int, *command: str | Path) -> list[str]:
    """A command in the namespaces of a process, in the current folder."""
    return ["nsenter", "--target", str(pid), *_KINDS, f"--wdns={Path.cwd()}", *map(str, command)]


def end(process: subprocess.Popen[bytes]) -> None:
    """End what `unshared` started, whose script ends with its standard input."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()  # and with it, --kill-child, the first process of the namespaces
        process.wait()
