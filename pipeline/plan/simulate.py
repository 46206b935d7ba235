"""Steps a second and idle GPUs of three ways to run the loop, from 8 to 16,384 GPUs, on the formulas of a plan.

Some GPUs train and the others sample, and

    synchronous      one waits for the other: step = rollout + train + sync
    one step off     the trainer works on the answers of the step before: step = max(rollout, train) + sync
    asynchronous     a place in a server that is free takes the next prompt, across the ends of steps, so the longest
                     answer delays nobody: step = max(steady, train) + sync

rollout is the time until the last answer of a step; steady that of as many tokens while the servers' places stay full,
of which there are no more than the answers of 1 + STALENESS steps fill. No mode is faster than `bound`, where places
are full without such a limit. A GPU is idle while it waits for the other task or for weights, and in a server by the
share of the places it began with that hold no sequence any more.

What staleness costs in reward is not simulated, nor are failures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline.plan import flops
from pipeline.plan.hardware import EFFICIENCY, GPU, Efficiency
from pipeline.plan.parameters import total
from pipeline.plan.rollout import Lengths, Server, generate

Mode = Literal["synchronous", "one step off", "asynchronous"]
MODES: tuple[Mode, ...] = ("synchronous", "one step off", "asynchronous")
STALENESS = 2
"""Steps by which an asynchronous sampler may run ahead."""

_SERVERS = 24  # of which a rollout is followed event by event; the others are like them
_SPLITS = 32  # divisions of the GPUs that are looked at


@dataclass(frozen=True)
class Phases:
    """Seconds of what a step needs. busy: share of the servers' places in use, on average over `rollout`.

    full: of sampling at full places, however many answers that takes.
    """

    rollout: float
    busy: float
    steady: float
    full: float
    train: float
    sync: float

    @property
    def bound(self) -> float:
        """Below which no mode can make a step."""
        return max(self.full, self.train)


@dataclass(frozen=True)
class Outcome:
    """seconds: of a step. idle: share of all GPUs' time."""

    mode: Mode
    trainer_gpus: int
    rollout_gpus: int
    seconds: float
    idle: float

    @property
    def steps_s(self) -> float:
        return 1 / self.seconds


def outcome(mode: Mode, phases: Phases, trainer_gpus: int, rollout_gpus: int) -> Outcome:
    """A mode with so many GPUs for each task."""
    p = phases
    sampled = p.steady if mode == "asynchronous" else p.rollout * p.busy
    seconds = (
        p.sync
        + {
            "synchronous": p.rollout + p.train,
            "one step off": max(p.rollout, p.train),
            "asynchronous": max(p.steady, p.train),
        }[mode]
    )
    used = trainer_gpus * p.train + rollout_gpus * sampled
    return Outcome(mode, trainer_gpus, rollout_gpus, seconds, 1 - used / ((trainer_gpus + rollout_gpus) * seconds))


@dataclass(frozen=True)
class Workload:
    """A model and what a step does with it.

    server: one of `server.gpus` GPUs. samples: answers of a step. quantum: GPUs of one replica of the trainer, so that
    its GPUs are a multiple. mini_batches: optimizer steps of a step.
    """

    hf: dict[str, Any]
    gpu: GPU
    server: Server
    lengths: Lengths
    prompt: float
    samples: int
    quantum: int
    mini_batches: int = 4
    recompute: str = "full"
    efficiency: Efficiency = EFFICIENCY
    seed: int = 0

    def phases(self, trainer_gpus: int, rollout_gpus: int) -> Phases:
        """Raises ValueError for fewer rollout GPUs than a server has."""
        servers = rollout_gpus // self.server.gpus
        if servers < 1:
            raise ValueError(f"a server takes {self.server.gpus} GPUs; {rollout_gpus} are too few")
        answers = self.lengths.sample(self.samples, self.seed)
        rollout, busy, steady, full = sampling(answers, servers, self.server, self.prompt)
        weights = 2.0 * total(self.hf) / (self.gpu.network * self.efficiency.network)
        return Phases(rollout, busy, steady, full, self._train_s(answers, trainer_gpus), weights)

    def _train_s(self, answers: np.ndarray, gpus: int) -> float:
        """Log-probs and update. A replica has whole sequences: with fewer of them than replicas, some have none."""
        sequences = self.prompt + answers
        tokens, squares = float(sequences.sum()), float((sequences**2).sum())
        done = flops.forward(self.hf, tokens, squares)
        done += flops.training(self.hf, tokens, squares, recompute=self.recompute)
        replicas = gpus // self.quantum
        each = len(answers) / self.mini_batches / replicas
        reduce = 0.0
        if replicas > 1:  # a ring moves a float32 gradient and a weight of each parameter out of each replica once
            reduce = (4 + 2) * total(self.hf) / self.quantum / (self.gpu.network * self.efficiency.network)
        busy = done / (gpus * self.gpu.bf16 * self.efficiency.train)
        return busy * math.ceil(each) / each + reduce * self.mini_batches


def sampling(answers: np.ndarray, servers: int, server: Server, prompt: float) -> tuple[float, float, float, float]:
    """(rollout, busy, steady, full) of Phases, for answers [N] that are dealt to the servers in turn.

    Where there are many servers, those with the longest answers are followed, and as many of the others.
    """
    shares = [answers[i::servers] for i in range(min(servers, len(answers)))]
    shares.sort(key=lambda share: (-share.max(), -share.sum()))
    followed = [*shares[: _SERVERS // 2], *shares[_SERVERS // 2 :: max(1, 2 * len(shares) // _SERVERS)]]
    runs = [generate(share, server.sequences, server.step_s, prompt) for share in followed]
    prefill = len(answers) / servers * server.prefill_s(prompt)
    decode = max(run.seconds for run in runs)
    most = min(server.sequences, len(shares[0]))
    # places that were in use, over the places of all servers until the slowest is done; those without answers count too
    rest = runs[_SERVERS // 2 :] or runs
    used = float(np.mean([run.busy * run.seconds * min(server.sequences, len(s)) for run, s in _pairs(rest, followed)]))
    busy = used * len(shares) / servers / (decode * most)
    context = prompt + float((answers**2).sum() / answers.sum()) / 2
    places = min(float(server.sequences), (1 + STALENESS) * len(answers) / servers)

    def at(batch: float) -> float:
        return float(answers.sum()) / servers / batch * server.step_s(batch, context) + prefill

    rollout = decode + prefill
    return rollout, (busy * decode + prefill) / rollout, at(places), at(float(server.sequences))


def _pairs(runs: Sequence[Any], followed: Sequence[np.ndarray]) -> Iterator[tuple[Any, np.ndarray]]:
    """Each run with its answers; `runs` are the last of `followed`'s."""
    return zip(runs, followed[-len(runs) :], strict=True)


def best(workload: Workload, gpus: int) -> dict[Mode, Outcome]:
    """Each mode with the division of the GPUs that suits it best. Raises ValueError where they are too few."""
    trained = range(workload.quantum, gpus - workload.server.gpus + 1, workload.quantum)
    if not trained:
        raise ValueError(
            f"{gpus} GPUs do not hold a trainer of {workload.quantum} and a server of {workload.server.gpus}"
        )
    looked_at = sorted({trained[round(i)] for i in np.linspace(0, len(trained) - 1, min(_SPLITS, len(trained)))})
    phases = {t: workload.phases(t, gpus - t) for t in looked_at}
    return {
        mode: min((outcome(mode, p, t, gpus - t) for t, p in phases.items()), key=lambda o: (o.seconds, o.idle))
        for mode in MODES
    }


def scaling(workload: Workload, sizes: Sequence[int], *, weak: bool) -> dict[int, dict[Mode, Outcome]]:
    """Every mode at every number of GPUs. weak: a step's answers grow with them, from `samples` at the first size."""
    return {
        gpus: best(replace(workload, samples=workload.samples * gpus // sizes[0]) if weak else workload, gpus)
        for gpus in sizes
    }
