"""The faults, and what a run does under each: its exit code, what it says, what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.observe.run_dir import RunDirectory
from tests.chaos.run import START_S, Outcome, Place, outcome
from tests.support.full_disk import MOUNTS, fill

STOPPED_S = 120.0  # in which a stopped process must have been named
RAYLET, RANK, SCHEDULER = "raylet/raylet", "ray::TrainerRank", "sglang::scheduler"


@dataclass(frozen=True)
class Fault:
    """try_out: yields a row a command."""

    name: str
    try_out: Callable[[Place], Iterator[Outcome]]


FAULTS: list[Fault] = []


def fault(function: Callable[[Place], Iterator[Outcome]]) -> Callable[[Place], Iterator[Outcome]]:
    """Adds to the table, under the function's name."""
    FAULTS.append(Fault(function.__name__, function))
    return function


# Nothing is started.


@fault
def mistakes_over_an_earlier_run(place: Place) -> Iterator[Outcome]:
    with RunDirectory(place.directory, {"name": "old"}) as old:
        old.record({"step": 1})
    data = place.folder / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n{")
    before = {f: f.stat().st_mtime_ns for f in place.directory.rglob("*")}
    run = place.start("run.overwrite=true", "data.task=null", f"data.path={data}", "supervised.steps=0")
    found = outcome("bad data over an earlier run", run, 2, "data.jsonl, line 2")
    if before != {f: f.stat().st_mtime_ns for f in place.directory.rglob("*")}:
        found.differs.append("the earlier run was touched")
    yield found


@fault
def no_place(place: Place) -> Iterator[Outcome]:
    (place.folder / "file").write_text("")
    place.directory = place.folder / "file" / "run"
    yield outcome("directory under a file", place.start(), 2, "cannot be made: .*/file is a file")
    if MOUNTS:
        place.mount("1m", ",ro")
        yield outcome("read-only disk", place.start(), 2, r"cannot be written: Read-only file system \(.* free")


@fault
def few_open_files(place: Place) -> Iterator[Outcome]:
    yield outcome("ulimit -n 128", place.start(limit=128), 2, r"ulimit -n is 128, .* needs \d+")


# A run goes on.


@fault
def second_run_stops_and_kill_of_the_driver(place: Place) -> Iterator[Outcome]:
    first = place.start()
    first.wait_for(r"checkpoint \S*step_2")
    for extra in (["run.overwrite=true"], ["--resume"]):
        second = place.start(*extra)
        said = rf"a run is going on in \S+: process {first.process.pid} on "
        found = outcome(f"a second run, {extra[0]}", second, 2, said)
        found.left.clear()  # the first one's
        found.differs[:] = [d for d in found.differs if d != "nothing should be left"]
        yield found
    first.steps()

    before = len(first.text())
    first.send(SCHEDULER, signal.SIGSTOP)
    which = r"answers of the servers|the server \S+ \(log|trainer rank 0 \(the server \S+ has not answered"
    said = rf"waiting for ({which}).* for \d+ s"
    first.wait_for(said, before, STOPPED_S)
    first.send(SCHEDULER, signal.SIGCONT)
    first.steps()
    before = len(first.text())
    first.send(RANK, signal.SIGSTOP)
    first.wait_for(r"waiting for trainer rank 0 \(rank 0 does not answer", before, STOPPED_S)
    first.send(RANK, signal.SIGCONT)
    first.steps()

    first.process.kill()
    yield outcome("kill -9 of the driver", first, -signal.SIGKILL, "", torn=True)
    resumed = place.start("--resume")
    resumed.wait_for(r"resuming from")
    resumed.steps()
    resumed.process.send_signal(signal.SIGTERM)
    yield outcome("resumed after it; SIGTERM", resumed, 75, "ended by SIGTERM after step .* --resume")


@fault
def kill_of_the_raylet(place: Place) -> Iterator[Outcome]:
    yield _killed(place, RAYLET, "kill -9 of the raylet", r"Ray's process the raylet.* was killed by SIGKILL")


@fault
def kill_of_a_trainer_rank(place: Place) -> Iterator[Outcome]:
    yield _killed(place, RANK, "kill -9 of a trainer rank", "trainer rank 0 died during")


@fault
def kill_of_a_scheduler(place: Place) -> Iterator[Outcome]:
    says = "server.max_restarts=0 in 3600 s are used up"
    yield _killed(place, SCHEDULER, "kill -9 of a scheduler", says, "server.max_restarts=0")


def _killed(place: Place, victim: str, name: str, says: str, *arguments: str) -> Outcome:
    run = place.start(*arguments)
    run.wait_for(r"step +2/")
    before = len(run.text())
    run.send(victim, signal.SIGKILL)
    return outcome(name, run, 1, says, since=before)


@fault
def signals_twice(place: Place) -> Iterator[Outcome]:
    # A forked rank ends by itself when the process that Ray kills in its place is gone: a stopped one cannot.
    run = place.start("checkpoint.grace_s=600", forked=False)
    run.wait_for(r"checkpoint \S*step_2")
    run.send(RANK, signal.SIGSTOP)  # the step that it would wait for never ends
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("finishing the step")
    run.process.send_signal(signal.SIGTERM)
    yield outcome("SIGTERM twice, a rank stopped", run, 75, "ended by SIGTERM; --resume goes on from")


@fault
def signals_to_all(place: Place) -> Iterator[Outcome]:
    """As Slurm sends them to a job, and a terminal's Ctrl-C to its group: Ray and the server get them too."""
    run = place.start(forked=False)
    run.wait_for(r"checkpoint \S*step_2")
    run.send_to_all(signal.SIGTERM)
    yield outcome("SIGTERM to all processes", run, 75, "ended by SIGTERM after step .* --resume")
    run = place.start("--resume", forked=False)
    run.wait_for(r"resuming from")
    run.steps()
    os.killpg(run.process.pid, signal.SIGTERM)
    yield outcome("SIGTERM to the group", run, 75, "ended by SIGTERM.*--resume")
    run = place.start("--resume", forked=False)
    run.wait_for(r"resuming from")
    run.steps()
    os.killpg(run.process.pid, signal.SIGINT)
    yield outcome("Ctrl-C", run, 130, "interrupted")
    run = place.start("run.overwrite=true", "checkpoint.every_steps=null", forked=False)
    run.wait_for("supervised")
    run.send_to_all(signal.SIGTERM)
    yield outcome("SIGTERM to all, at the start", run, 130, "interrupted")


@fault
def directory_deleted(place: Place) -> Iterator[Outcome]:
    run = place.start("checkpoint.every_steps=null")
    run.wait_for(r"step +2/")
    shutil.rmtree(place.directory, ignore_errors=True)
    shutil.rmtree(place.directory, ignore_errors=True)
    yield outcome("run directory deleted", run, 1, "was removed or moved while the run wrote|was not written")


@fault
def start_that_fails_over_an_earlier_run(place: Place) -> Iterator[Outcome]:
    with RunDirectory(place.directory, {"name": "old"}) as old:
        old.record({"step": 1})
    run = place.start("run.overwrite=true")
    run.wait_for("supervised 1/2")
    run.process.kill()
    killed = outcome("kill -9 of a start over a run", run, -signal.SIGKILL, "")
    yield killed
    run = place.start("run.overwrite=true", "checks.max_abs_logprob=1e-12")
    found = outcome(
        "engines disagree after it", run, 1, "the earlier run in .* is as it was; the logs of this start are",
        within_s=START_S,
    )  # fmt: skip
    if "a start was interrupted that had moved the earlier run aside" not in run.text():
        found.differs.append("the interrupted start was not said")
    if (place.directory / "metrics.jsonl").read_text() != '{"step": 1}\n':
        found.differs.append("the earlier run is not as it was")
    if not (place.directory / "failed" / "logs" / "sglang.log").is_file():
        found.differs.append("the logs of the failed start are not there")
    yield found


if MOUNTS:

    @fault
    def disk_full(place: Place) -> Iterator[Outcome]:
        disk = place.mount("64m")
        run = place.start("checkpoint.every_steps=null")
        run.wait_for(r"step +2/")
        fill(disk)
        yield outcome("disk full", run, 1, r"was not written: No space left on device \(.* are free there\)")

    @fault
    def disk_full_for_a_checkpoint(place: Place) -> Iterator[Outcome]:
        disk = place.mount("64m")
        run = place.start("checkpoint.every_steps=10")
        run.wait_for(r"step +2/")
        filler = fill(disk)
        os.truncate(filler, filler.stat().st_size - 300_000)  # rows have room
        yield outcome("disk full for a checkpoint", run, 1, r"checkpoint step_10 was not written: .*No space left")


@fault
def run_goes_to_its_end(place: Place) -> Iterator[Outcome]:
    """What the others are compared with: nothing is left of a run that ends by itself."""
    run = place.start("train.steps=2", forked=False)
    yield outcome("no fault", run, 0, "run directory: ", within_s=START_S)


@fault
def unruly_verifier(place: Place) -> Iterator[Outcome]:
    """One that exits, hangs, forks and prints, by the answer. Its failures are counted, and nothing of it stays."""
    run = place.start("train.steps=3", "rewards=tests.support.verifiers:unruly", "grading.timeout_s=2")
    found = outcome("a verifier that exits, hangs, forks", run, 0, "run directory: ", within_s=START_S)
    rows = [json.loads(line) for line in (place.directory / "metrics.jsonl").read_text().splitlines()]
    if not sum(row.get("reward/failed", 0) for row in rows):
        found.differs.append("no failure was counted")
    yield found
