"""A Ray cluster of two nodes on this machine that share no network, no processes and no shared memory; two_nodes.sh."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline.forks import FORKS_VARIABLE
from tests.support.namespaces import end, inside, unshared
from tests.support.ray_node import HEAD, PORT

_HERE = Path(__file__).parent


class TwoNodes:
    """A context: up when it is entered, and nothing of it is left on leaving, or when this process dies.

    folder: seen by both nodes. address: of the Ray cluster.
    """

    address = f"{HEAD}:{PORT}"

    def __enter__(self):
        if os.geteuid() != 0:
            raise RuntimeError("two nodes on one machine are namespaces, which only root may make: run this as root")
        self.folder = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))  # short: sockets stand below it
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SAMEROUTE_"))} | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": str(Path.cwd()),
        }  # fmt: skip
        command = unshared(_HERE / "two_nodes.sh", sys.executable, self.folder)
        with (self.folder / "nodes.out").open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=self.environment
            )
        return self

    def __exit__(self, *_):
        end(self._process)
        shutil.rmtree(self.folder)

    def node(self, number: int) -> psutil.Process:
        """The first process of a node."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.logs()
            for script in psutil.Process(self._process.pid).children():
                nodes = [c for c in script.children() if c.name() == "unshare"]
                if len(nodes) >= number and nodes[number - 1].children():
                    return nodes[number - 1].children()[0]
            time.sleep(0.05)
        raise TimeoutError(self.logs())

    def start(self, output: Path, *command: str | Path) -> subprocess.Popen[bytes]:
        """A command on the first node, in the current folder; servers that it starts are forked as others there."""
        node, forks, deadline = self.node(1), self.folder / "forks1", time.monotonic() + 30
        while not forks.exists():
            assert self._process.poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)
        with output.open("wb") as out:
            return subprocess.Popen(
                inside(node.pid, *command), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=self.environment | {FORKS_VARIABLE: forks.read_text()},
            )  # fmt: skip

    def logs(self) -> str:
        """The ends of all logs, for a failed test."""
        files = sorted(self.folder.glob("**/*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {f}\n{f.read_text(errors='replace')[-2000:]}" for f in files if "session_" not in str(f))
