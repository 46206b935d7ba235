"""Standard output and standard error of a command: neither a reader that goes nor a strange character ends it.

`sameroute objectives | head` closes the pipe after ten lines. A command then finishes its work, with its own exit code,
and what it still prints goes nowhere. For a run that means: it trains on when the terminal's pipe has gone.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _PatientFile(io.FileIO):
    """A descriptor that is open for writing. Once its reader has gone it is /dev/null."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def make_patient() -> None:
    """Let sys.stdout and sys.stderr outlive their readers, and escape what their encoding does not have.

    A stream that is not the process's own (in a test, in a notebook) gets the escapes alone.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, _patient(stream, descriptor))
        else:
            stream.reconfigure(errors="backslashreplace")


def _patient(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    file = _PatientFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
