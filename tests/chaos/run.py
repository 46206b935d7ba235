"""One command under a fault: started in a place of its own, its processes found by a mark, what it leaves looked at."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.full_disk import small_disk

QUICKSTART = "configs/quickstart.yaml"
SMALL = (
    "model.tiny.layers=2", "model.tiny.hidden=32", "model.tiny.head_dim=16", "model.tiny.moe_intermediate=32",
    "supervised.steps=2", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
    "train.steps=9999", "train.mini_batches=1", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4",
    "checks.first_rollouts=4", "checkpoint.every_steps=2", "run.overwrite=false",
)  # fmt: skip
START_S = 180.0  # until words of a start are there, on a busy machine
GONE_S = 30.0  # until the last process of a killed run is gone
_over = threading.Event()
_places: list[Place] = []


class Place:
    """Folders for the runs of one fault: run/, and a short TMPDIR. A context; nothing outlives it.

    forks: the environment under which engines are forked from processes that have made their imports.
    """

    def __init__(self, forks: Mapping[str, str]):
        self.forks = forks

    def __enter__(self) -> Place:
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.temporary = Path(f"/tmp/{secrets.token_hex(2)}")  # short, so that the run's own folder stands in it
        self.temporary.mkdir()
        self._stack.callback(shutil.rmtree, self.temporary, ignore_errors=True)
        self.directory = self.folder / "run"
        self.runs: list[Run] = []
        _places.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs:
            run.kill()
        _places.remove(self)
        self._stack.close()

    def mount(self, size: str, options: str = "") -> Path:
        """A small disk; run.directory is on it from now on."""
        disk = self._stack.enter_context(small_disk(self.folder / "disk", size, options))
        self.directory = disk / "run"
        return disk

    def start(self, *arguments: str, limit: int | None = None, forked: bool = True) -> Run:
        """`sameroute train`, small. limit: on open files. forked: false for all of it as a user has it. Raises
        AssertionError behind `end_all`."""
        assert not _over.is_set(), "the chaos is over"
        run = Run(self, arguments, limit, self.forks if forked else {})
        self.runs.append(run)
        if _over.is_set():  # meanwhile
            run.kill()
        return run


def end_all() -> None:
    """From now on no place starts a run, and those that go on are killed: whoever waits for one has AssertionError."""
    _over.set()
    for place in list(_places):
        for run in list(place.runs):
            run.kill()


class Run:
    """A command that was started."""

    def __init__(self, place: Place, arguments: Sequence[str], limit: int | None, forks: Mapping[str, str]):
        self.place, self.mark = place, f"chaos-{uuid.uuid4().hex}"
        self.output = place.folder / f"output{len(place.runs)}.txt"
        words = [sys.executable, "-m", "pipeline.commands.main", "train", QUICKSTART]
        words += [f"run.directory={place.directory}", *SMALL, *arguments]
        if limit is not None:
            words = ["bash", "-c", f'ulimit -n {limit} && exec "$@"', "-", *words]
        # What torch compiles is kept from run to run beside their own folders; it is not what a run leaves.
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(place.folder / "compiled")}
        environment = os.environ | forks | kept | {"TMPDIR": str(place.temporary), "CHAOS_MARK": self.mark}
        self.begun = time.monotonic()
        with self.output.open("wb") as output:
            # A group of its own, as a terminal gives a command.
            self.process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, words: str, after: int = 0, timeout_s: float = START_S) -> None:
        """Until a line matches. after: characters of the output that do not count."""
        deadline = time.monotonic() + timeout_s
        while not re.search(words, self.text()[after:]):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{words!r} was not said:\n{self.text()[-3000:]}")
            time.sleep(0.1)

    def steps(self, count: int = 1) -> None:
        """Until so many more steps are done."""
        before = len(self.text())
        for _ in range(count):
            self.wait_for(r"step +\d+/", before)
            before += len(self.text()[before:].partition("\n")[0]) + 1

    def processes(self, name: str = "") -> list[int]:
        """Ids of all that carry the mark and have this in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"CHAOS_MARK={self.mark}".encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if name in line and line:
                        found.append(int(entry.name))
        return found

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal to every process of this name."""
        found = self.processes(name)
        assert found, f"no process {name}"
        for pid in found:
            os.kill(pid, number)

    def send_to_all(self, number: signal.Signals) -> None:
        """A signal to every process of the run, as Slurm sends it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, timeout_s: float = 90) -> tuple[int, float]:
        """Exit code, and seconds from now to the end."""
        begun = time.monotonic()
        return self.process.wait(timeout_s), time.monotonic() - begun

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class Outcome:
    """A row. differs: how from the table; empty: not at all."""

    name: str
    code: int
    seconds: float
    said: str
    left: list[str]
    differs: list[str]
    text: str

    def __str__(self) -> str:
        row = f"{self.name:<34} code {self.code:>3}  {self.seconds:5.1f} s  {self.said}"
        left = "".join(f"\n{'':<34} left: {item}" for item in self.left)
        wrong = "".join(f"\n{'':<34} DIFFERS: {item}" for item in self.differs)
        return row + left + (f"{wrong}\n{self.text[-3000:]}" if wrong else "")


def outcome(
    name: str,
    run: Run,
    code: int,
    says: str,
    *,
    within_s: float = 45,
    torn: bool = False,
    since: int = 0,
    most_lines: int = 12,
) -> Outcome:
    """The end of a run, compared with what the table says. says: a pattern of its last words. since: characters of the
    output before the fault. most_lines: beside those of steps."""
    found, seconds = run.end(within_s + 60)
    gone = time.monotonic() + GONE_S
    while (alive := run.processes()) and time.monotonic() < gone:
        time.sleep(0.1)
    text = run.text()[since:]
    left = [f"process {pid}" for pid in alive] + leftovers(run.place)
    differs = []
    if found != code:
        differs.append(f"the exit code should be {code}")
    if says and not re.search(says, text):
        differs.append(f"it should say {says!r}")
    if "Traceback" in text:
        differs.append("it shows a traceback")
    told = [line for line in text.splitlines() if not line.startswith(("step ", "checkpoint ", "supervised "))]
    if len(told) > most_lines and "sglang.log:" not in text:  # else the end of that log is quoted
        differs.append(f"it says much: {len(told)} lines")
    if seconds > within_s:
        differs.append(f"it should end within {within_s:g} s")
    if found >= 0 and left:
        differs.append("nothing should be left")
    if not torn and (rows := torn_rows(run.place.directory)):
        differs.append(f"torn: {rows}")
    lines = [line for line in text.splitlines() if line.startswith("sameroute:")] or text.splitlines() or [""]
    return Outcome(name, found, seconds, lines[-1][:170], left, differs, text)


def leftovers(place: Place) -> list[str]:
    """In the temporary folder, and what of a run directory is only there while a run goes on."""
    hidden = [*place.directory.glob(".*"), *(place.directory / "checkpoints").glob(".*")]
    return sorted(map(str, (*place.temporary.iterdir(), *hidden)))


def torn_rows(directory: Path) -> list[str]:
    """Lines of both files of rows that are not whole."""
    wrong = []
    for file in (directory / "metrics.jsonl", directory / "records.jsonl"):
        for line in file.read_text().splitlines(keepends=True) if file.is_file() else []:
            try:
                json.loads(line)
                whole = line.endswith("\n")
            except ValueError:
                whole = False
            if not whole:
                wrong.append(f"{file.name}: {line[:80]!r}")
    return wrong
