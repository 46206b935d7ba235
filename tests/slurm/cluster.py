"""A real Slurm (Debian's slurmctld, slurmd and munge) of two nodes on this machine; see cluster.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from tests.support.namespaces import end, inside, unshared
from tests.support.processes import command_line, name_of

_HERE = Path(__file__).parent
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "nsenter", "ip")


class SlurmCluster:
    """A context: up when it is entered; nothing of it is left on leaving, or when this process dies.

    settings: lines of slurm.conf.
    folder: everything of it, and where jobs may write; all nodes see it. Its path is short: sockets stand below it.
    """

    def __init__(self, *settings: str):
        self.settings = settings

    def __enter__(self):
        if os.geteuid() != 0:
            raise RuntimeError("the Slurm of the tests runs in namespaces of its own and needs root: run this as root")
        if missing := [c for c in COMMANDS if shutil.which(c) is None]:
            raise RuntimeError(f"there is no {', '.join(missing)}; `make test-slurm` installs Debian's packages")
        self.folder = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
        for name in ("state", "scratch", "spool.node1", "spool.node2"):
            (self.folder / name).mkdir()
        conf = self.folder / "slurm.conf"
        lines = [(_HERE / "slurm.conf").read_text().replace("FOLDER", str(self.folder)), *self.settings, ""]
        conf.write_text("\n".join(lines))
        with (self.folder / "cluster.out").open("wb") as output:
            self._process = subprocess.Popen(
                unshared(_HERE / "cluster.sh", self.folder),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_up(self, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            children = psutil.Process(self._process.pid).children()
            self._init = children[0].pid if children else None
            if self._init and self.run("sinfo", "-h", "-o", "%D %t", check=False).split() == ["2", "idle"]:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                logs = "".join(f"\n{p}:\n{p.read_text()[-2000:]}" for p in self.folder.glob("*.out"))
                raise RuntimeError(f"the Slurm of the tests did not start{logs}")
            time.sleep(0.1)

    def __exit__(self, *_):
        end(self._process)
        shutil.rmtree(self.folder)

    def run(self, *command: str | Path, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run on the control node, in the current folder; its output, errors too."""
        done = subprocess.run(
            inside(self._init, *command),
            env=self.environment() | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}: {done.stdout}")
        return done.stdout

    def environment(self) -> dict[str, str]:
        """That of a user of this cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SAMEROUTE_", "RAY_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def job(self, number: int) -> dict[str, str]:
        """The job's record: `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", str(number), "--oneliner")))

    def wait_for_state(self, number: int, *states: str, timeout_s: float = 240) -> dict[str, str]:
        """The job's record once it is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}\n{self.logs()}"
            time.sleep(0.3)
        return job

    def wait_for_text(self, file: Path, words: str, timeout_s: float = 200) -> None:
        """Until a file is there and holds the words."""
        deadline = time.monotonic() + timeout_s
        while not file.is_file() or words not in file.read_text():
            assert time.monotonic() < deadline, f"no {words!r} in {file}\n{self.logs()}"
            time.sleep(0.2)

    def _nodes(self) -> list[psutil.Process]:
        """The first process of each node's namespaces."""
        return [c.children()[0] for c in psutil.Process(self._init).children() if c.name() == "unshare"]

    def lose_second_node(self) -> None:
        """Its processes, its interface and its address are gone at once, as if it had lost its power."""
        self._nodes()[1].kill()

    def processes(self) -> list[str]:
        """Command lines of all processes on the nodes but Slurm's own, as the machine sees them."""
        below = [p for node in self._nodes() for p in node.children(recursive=True)]
        return [line[:200] for p in below if name_of(p) != "slurmd" and (line := command_line(p))]

    def logs(self) -> str:
        """The ends of all logs, for a failed test."""
        files = sorted(self.folder.rglob("*.log")) + sorted(self.folder.rglob("*.out"))
        return "\n".join(f"--- {f}\n{f.read_text(errors='replace')[-3000:]}" for f in files)
