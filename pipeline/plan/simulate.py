"""Steps a second and idle GPUs of three ways to run the loop, from 8 to 16,384 GPUs, on the formulas of a plan.

Some GPUs train and the others sample, and a mode is how far sampling may run ahead (`rollout.max_staleness` and
`rollout.ahead` of a run):

    synchronous      (0, 0)  one waits for the other: step = rollout + train + sync
    one step off     (1, 1)  the next step's groups are sampled while the trainer works, and are due right after it
    asynchronous     (4, 3)  groups that take long have four steps until they are due

The first is a formula; the other two follow `beside.follow`, which asks the rule of a run itself
(`rollout.admission.Admission`). Formulas choose the divisions of the GPUs that are followed: max(rollout, train) + sync
and max(steady, train) + sync, where `rollout` and `steady` are those of `Sampling`: with the tail of the longest
answers, and without. No mode is faster than `bound`, where the servers are always full. A GPU is idle while it waits
for the other task or for weights, and in a server by the share of its places that hold no sequence.

What staleness costs in reward is not simulated, nor are failures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_ext.hf.description import ModelDescription
from pipeline.plan.beside import follow
from pipeline.plan.counts import flops
from pipeline.plan.counts.parameters import total
from pipeline.plan.hardware import EFFICIENCY, GPU, Efficiency
from pipeline.plan.sampling import Lengths, Sampling, Server, sample
from pipeline.rollout.admission import Admission

Mode = Literal["synchronous", "one step off", "asynchronous"]
MODES: tuple[Mode, ...] = ("synchronous", "one step off", "asynchronous")
ADAPTERS = 8  # that weights leave a machine by, and come into one
AHEAD: dict[Mode, tuple[int, int]] = {"synchronous": (0, 0), "one step off": (1, 1), "asynchronous": (4, 3)}
"""max_staleness and ahead of each."""

_SPLITS = 32  # divisions of the GPUs that are looked at
_FOLLOWED = 4  # of these divisions, at most, that by their formula take no longer than so many times the best
_NEAR = 1.5
_STEPS = 4  # that are followed
_SERVERS = 8  # that are followed; more of them are like these
_ANSWERS = 1024  # of a step that are followed, at most


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
    """A mode with so many GPUs for each task, by its formula."""
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
    its GPUs are a multiple. mini_batches: optimizer steps of a step. group: answers of a prompt.
    """

    model: ModelDescription
    gpu: GPU
    server: Server
    lengths: Lengths
    prompt: float
    samples: int
    quantum: int
    mini_batches: int = 4
    group: int = 16
    recompute: str = "full"
    efficiency: Efficiency = EFFICIENCY
    seed: int = 0

    def phases(self, trainer_gpus: int, rollout_gpus: int) -> Phases:
        """Raises ValueError for fewer rollout GPUs than a server has."""
        servers = rollout_gpus // self.server.gpus
        if servers < 1:
            raise ValueError(f"a server takes {self.server.gpus} GPUs; {rollout_gpus} are too few")
        answers = self.lengths.sample(self.samples, self.seed)
        sampling = sample(answers, servers, self.server, self.prompt, ahead=AHEAD["asynchronous"][1])
        adapters = min(ADAPTERS, trainer_gpus, rollout_gpus)  # see `weight_transfer`
        weights = 2.0 * total(self.model) / adapters / (self.gpu.network * self.efficiency.network)
        return Phases(sampling, self._train_s(answers, trainer_gpus), weights)

    def followed(self, mode: Mode, phases: Phases, trainer_gpus: int, rollout_gpus: int) -> Outcome:
        """A mode under the rule of a run, event by event. Many servers and answers are stood for by some of both."""
        if mode == "synchronous":
            return outcome(mode, phases, trainer_gpus, rollout_gpus)
        servers = rollout_gpus // self.server.gpus
        share = min(1.0, _SERVERS / servers, _ANSWERS / self.samples)
        some, groups = max(1, round(servers * share)), self.samples // self.group
        own = max(1, round(groups * some / servers))
        lengths = self.lengths.sample(own * self.group * _STEPS, self.seed).reshape(-1, self.group)
        rule = Admission(own, *AHEAD[mode])
        times = {"train_s": phases.train, "sync_s": phases.sync}
        pace = follow(lengths, rule, some, self.server, self.prompt, steps=_STEPS, **times)
        used = trainer_gpus * pace.trainer + rollout_gpus * pace.servers
        return Outcome(mode, trainer_gpus, rollout_gpus, pace.seconds, 1 - used / (trainer_gpus + rollout_gpus))

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
    found = {}
    for mode in MODES:
        ranked = sorted((outcome(mode, p, t, gpus - t) for t, p in phases.items()), key=lambda o: (o.seconds, o.idle))
        near = [o for o in ranked if o.seconds < _NEAR * ranked[0].seconds]
        some = ranked[:1] if mode == "synchronous" else near[:: -(-len(near) // _FOLLOWED)]
        followed = [workload.followed(mode, phases[o.trainer_gpus], o.trainer_gpus, o.rollout_gpus) for o in some]
        found[mode] = min(followed, key=lambda o: (o.seconds, o.idle))
    return found


def scaling(workload: Workload, sizes: Sequence[int], *, weak: bool) -> dict[int, dict[Mode, Outcome]]:
    """Every mode at every number of GPUs. weak: a step's answers grow with them, from `samples` at the first size."""
    return {
        gpus: best(replace(workload, samples=workload.samples * gpus // sizes[0]) if weak else workload, gpus)
        for gpus in sizes
    }
