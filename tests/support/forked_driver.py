"""A driver forked by `preloaded_imports.py`, used as a `subprocess.Popen` of `sameroute` is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from pipeline.forks import ended, request
from tests.support.preloaded import DRIVER_FORKS_VARIABLE

_START_S = 60  # its imports may have only begun


class ForkedDriver:
    """`sameroute ARGUMENTS`, whose standard output and error go to a file. pid_file: a path where nothing is yet."""

    def __init__(self, pid_file: Path, output: Path, arguments: list[str], environment: dict[str, str]):
        self._place, self.returncode = environment[DRIVER_FORKS_VARIABLE], None
        with output.open("wb") as out, open(os.devnull, "rb") as nothing:
            streams = nothing.fileno(), out.fileno(), out.fileno()
            self._connection = request(self._place, [str(pid_file), *arguments], environment, streams)
        deadline = time.monotonic() + _START_S
        while not pid_file.exists():
            assert self.poll() is None, output.read_text()
            assert time.monotonic() < deadline, f"no process is forked at {self._place}"
            time.sleep(0.01)
        self.pid = int(pid_file.read_text())

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code, -n where signal n ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._connection.settimeout(timeout_s)
            try:
                self.returncode = ended(self._place, self._connection)
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("sameroute", timeout_s or 0.0) from error
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
