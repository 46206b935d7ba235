"""Random faults while rollouts run ahead of training: the run ends by itself, loses no prompt, and learns as well."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet

from tests.chaos.run import Outcome, Place, Run, outcome
from tests.chaos.table import RANK, Fault

SEED = 1
STEPS, GROUPS, SAMPLES = 30, 4, 4
RUN = (
    f"train.steps={STEPS}", "train.lr=3e-3", "parallel={ranks: 2, expert: 2}", "checkpoint.every_steps=3",
    "rollout.max_staleness=2", "rollout.max_new_tokens=48", "rewards=tests.support.verifiers:evens",
    "server.replicas=2", "server.context_length=128", "server.probe_timeout_s=4", "server.max_restarts=20",
    "run.max_restarts=2",
)  # fmt: skip
FAULTS = ("kill", "kill", "kill", "kill", "stop", "stop", "rank")
FIRST = 6  # the first checkpoint is there then, without which a run does not begin again
STOPPED_S = 20.0
LAST = 10
NOISE = 0.08
"""Of the mean reward of the last LAST steps; the reward rises from 0.5 to 0.8. Without faults two seeds are 0.01 apart
there, and one step moves by 0.03."""
END_S = 150.0
SERVER_MARK = "SAMEROUTE_SERVER_TOKEN="


def random_faults(place: Place) -> Iterator[Outcome]:
    """Each strikes at a random moment behind a random step; the verifier raises for one answer of twenty."""
    calm = place.start(*RUN)
    yield _row("asynchronous, no fault", place, calm)
    expected = rewards(place.directory)[-LAST:].mean()

    place.directory = place.folder / "disturbed"
    run = place.start(*RUN)
    with Striking(run, SEED) as striking:
        for step, fault in striking.plan:
            striking.strike(step, fault)
        found = _row(f"asynchronous, seed {SEED}", place, run)
    print("\n".join(striking.done), flush=True)
    if found.code == 0:
        learnt, last = rewards(place.directory)[-LAST:].mean(), rows(place.directory)[-1]
        counts = ", ".join(
            f"{name} {last[f'servers/{name}']:g}" for name in ("lost", "restarted", "requests_sent_again")
        )
        print(
            f"{'':<34} reward {learnt:.3f}, without faults {expected:.3f}; since the last start: {counts}", flush=True
        )
        if abs(learnt - expected) > NOISE:
            found.differs.append("its reward is not that of the run without faults")
        if (restarts := last["run/restarts"]) != 1:
            found.differs.append(f"it began again {restarts:g} times")
    yield found


class Striking:
    """A context: what was stopped goes on, whatever happens."""

    def __init__(self, run: Run, seed: int):
        self.run, self._draw, self._seen = run, random.Random(seed), 0
        self._timers: list[threading.Timer] = []
        self.done: list[str] = []
        steps = sorted(self._draw.sample(range(FIRST, STEPS - 2), len(FAULTS)))
        self.plan = list(zip(steps, self._draw.sample(FAULTS, len(FAULTS)), strict=True))

    def __enter__(self) -> Striking:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.join()

    def strike(self, step: int, fault: str) -> None:
        self.run.wait_for(rf"step +({'|'.join(map(str, range(step, STEPS)))})/", self._seen)
        time.sleep(self._draw.uniform(0, 0.5))
        if fault == "rank":
            self._seen = len(self.run.text())  # what follows is after the restart
            pid = self._draw.choice(sorted(self.run.processes(RANK)))
        else:
            servers = self._servers()
            pid = self._draw.choice(servers[self._draw.choice(sorted(servers))])
        name = ""
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            os.kill(pid, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        if fault == "stop":
            timer = threading.Timer(STOPPED_S, self._go_on, [pid])
            timer.start()
            self._timers.append(timer)
        self.done.append(f"{'':<34} after step {step}: {'SIGSTOP' if fault == 'stop' else 'SIGKILL'} to {name}")

    def _servers(self) -> dict[str, list[int]]:
        """Processes of each server that has any."""
        found: dict[str, list[int]] = {}
        for pid in sorted(self.run.processes()):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                for token in (v for v in variables if v.startswith(SERVER_MARK)):
                    found.setdefault(token, []).append(pid)
        return found

    @staticmethod
    def _go_on(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _row(name: str, place: Place, run: Run) -> Outcome:
    """A run that ends by itself, and what the table of its answers says of its prompts."""
    found = outcome(name, run, 0, "run directory: ", within_s=END_S, most_lines=100)
    if found.code == 0:
        found.differs.extend(unaccounted(place.directory))
    return found


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def rewards(directory: Path) -> np.ndarray:
    """[steps] float64: mean of each."""
    return np.array([row["reward/mean"] for row in rows(directory)])


def unaccounted(directory: Path) -> list[str]:
    """What is wrong with the ends of a run's prompts; empty: each that was admitted ended once, and no step trained on
    more or fewer than it should."""
    answers = pyarrow.parquet.read_table(directory / "episodes").to_pylist()
    samples = Counter((answer["prompt"], answer["sample"]) for answer in answers)
    prompts = Counter(prompt for prompt, _ in samples)
    steps = {(answer["step"], answer["prompt"]) for answer in answers if answer["step"] is not None}
    trained, times = Counter(step for step, _ in steps), Counter(prompt for _, prompt in steps)
    every = range(1, STEPS + 1)
    wrong = {
        "steps in metrics.jsonl": Counter(row["step"] for row in rows(directory)) - Counter(every),
        "steps with other than GROUPS prompts": {s: trained[s] for s in every if trained[s] != GROUPS},
        "prompts that were admitted and never ended": set(range(max(prompts) + 1)) - set(prompts),
        "answers with two ends": {answer for answer, count in samples.items() if count > 1},
        "prompts with other than SAMPLES answers": {p: n for p, n in prompts.items() if n != SAMPLES},
        "prompts trained on twice": {p for p, n in times.items() if n > 1},
        "failures of the verifier": set() if any(answer["failure"] for answer in answers) else {"none"},
    }
    return [f"{what}: {found}" for what, found in wrong.items() if found]


ASYNCHRONOUS = Fault("asynchronous_under_random_faults", random_faults)
