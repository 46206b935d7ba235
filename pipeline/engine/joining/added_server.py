"""A server that somebody else started and added to a run: the run asks it, and neither starts nor ends it."""

from __future__ import annotations

from pathlib import Path

from pipeline.cluster.stacks import ProcessStacks
from pipeline.engine.control import SGLangControl
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError


class AddedServer:
    """A ServerProcess. keys: that open it. log: its log, where the run can see it."""

    def __init__(self, url: str, keys: ServerKeys, log: Path | None = None):
        self.url, self.keys = url, keys
        self.log_path = log or Path(f"that of {url}")

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises ServerError where it does not answer now."""
        SGLangControl(self.url, keys=self.keys, timeout_s=timeout_s or 30.0).server_info()

    def alive(self) -> bool:
        """Its processes are not seen from here; the fleet's probe finds out whether it answers."""
        return True

    def log_tail(self) -> str:
        """Where to look."""
        return f"its log: {self.log_path}"

    def stacks(self) -> list[ProcessStacks]:
        """None: its processes are not seen from here."""
        return []

    def restart(self) -> None:
        """Nobody here can."""
        raise ServerError(f"{self.url} was added to the run, which cannot start it")

    def stop(self) -> None:
        """It is not the run's to end."""
