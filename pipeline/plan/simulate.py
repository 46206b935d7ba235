"""Steps a second and idle GPUs of three ways to run the loop, from 8 to 16,384 GPUs, on the formulas of a plan.

Some GPUs train and the others sample, and

    synchronous      one waits for the other: step = rollout + train + sync
    one step off     the trainer works on the answers of the step before: step = max(rollout, train) + sync
    asynchronous     a place in a server that is free takes the next prompt, across the ends of steps, so the longest
                     answer delays nobody: step = max(steady, train) + sync

`rollout` and `steady` are those of `rollout.Sampling`: with the tail of the longest answers, and without. No mode is
faster than `bound`, where the servers are always full. A GPU is idle while it waits for the other task or for weights,
and in a server by the share of the places it began with that hold no sequence any more.

What staleness costs in reward is not simulated, nor are failures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_ext.hf.description import ModelDescription
from pipeline.plan import flops
from pipeline.plan.hardware import EFFICIENCY, GPU, Efficiency
from pipeline.plan.parameters import total
from pipeline.plan.sampling import Lengths, Sampling, Server, sample

Mode = Literal["synchronous", "one step off", "asynchronous"]
MODES: tuple[Mode, ...] = ("synchronous", "one step off", "asynchronous")
STALENESS = 2
"""Steps by which an asynchronous sampler may run ahead."""

_SPLITS = 32  # divisions of the GPUs that are looked at


@dataclass(frozen=True)
class Phases:
    """Seconds of what a step needs."""

    sampling: Sampling
    train: float
    sync: float

    @property
    def bound(self) -> float:
        """Below which no mode can make a step."""
        return max(self.sampling.full, self.train)


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
    s, train = phases.sampling, phases.train
    sampled = s.steady if mode == "asynchronous" else s.rollout * s.busy
    seconds = (
        phases.sync
        + {
            "synchronous": s.rollout + train,
            "one step off": max(s.rollout, train),
            "asynchronous": max(s.steady, train),
        }[mode]
    )
    used = trainer_gpus * train + rollout_gpus * sampled
    return Outcome(mode, trainer_gpus, rollout_gpus, seconds, 1 - used / ((trainer_gpus + rollout_gpus) * seconds))


@dataclass(frozen=True)
class Workload:
    """A model and what a step does with it.

    server: one of `server.gpus` GPUs. samples: answers of a step. quantum: GPUs of one replica of the trainer, so that
    its GPUs are a multiple. mini_batches: optimizer steps of a step.
    """

    model: ModelDescription
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
        sampling = sample(answers, servers, self.server, self.prompt, ahead=STALENESS)
        weights = 2.0 * total(self.model) / (self.gpu.network * self.efficiency.network)
        return Phases(sampling, self._train_s(answers, trainer_gpus), weights)

    def _train_s(self, answers: np.ndarray, gpus: int) -> float:
        """Log-probs and update. A replica has whole sequences: with fewer of them than replicas, some have none."""
        sequences = self.prompt + answers
        tokens, squares = float(sequences.sum()), float((sequences**2).sum())
        done = flops.training(self.model, tokens, squares, recompute=self.recompute)
        if self.mini_batches > 1:
            done += flops.forward(self.model, tokens, squares)
        replicas = gpus // self.quantum
        each = len(answers) / self.mini_batches / replicas
        reduce = 0.0
        if replicas > 1:  # a ring moves a float32 gradient and a weight of each parameter out of each replica once
            reduce = (4 + 2) * total(self.model) / self.quantum / (self.gpu.network * self.efficiency.network)
        busy = done / (gpus * self.gpu.bf16 * self.efficiency.train)
        return busy * math.ceil(each) / each + reduce * self.mini_batches


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
