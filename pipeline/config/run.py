"""What a run does and where: its directory, its steps, what stops it, its machines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from megatron_ext.config import Frozen, OptimizerConfig

GPUName = Literal["a100", "h100", "h200", "b200", "b300"]
"""Kinds of GPU that `sameroute plan` has figures of: the keys of `pipeline.plan.hardware.GPUS`."""


class RunConfig(Frozen):
    """Where a run leaves its files, and what makes it repeatable."""

    directory: Path = Field(Path("runs/run"), description="run directory, made by the run")
    overwrite: bool = Field(
        False,
        description="delete a run that is already there, unless --resume is given; false: resume it from its newest "
        "checkpoint where it has one, else refuse",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of weights, prompts and sampling")
    max_restarts: int = Field(
        0,
        ge=0,
        description="a run whose trainer rank, server or Ray failed begins again from its newest checkpoint by itself, "
        "so often within run.restart_window_minutes; 0: it ends",
    )
    rollback_after: int | None = Field(
        None,
        ge=1,
        description="after so many steps in a row with a skipped update the run begins again from its last checkpoint "
        "before them, and passes over the prompts that led there; counts as a restart of run.max_restarts; null: never",
    )
    restart_window_minutes: float = Field(60.0, gt=0, description="restarts that are longer ago do not count")
    rollouts_shown: int = Field(4, ge=0, description="sampled rollouts written in readable form, each step")


Order = Literal["finish", "admission"]
"""In which finished groups are trained on."""

InterruptMode = Literal["abort", "in_place", "retract", "drain"]
"""What happens to running requests while weights change; see pipeline/engine/interruption.py."""


class RolloutConfig(Frozen):
    """What is sampled each step, and how far sampling may run ahead of training."""

    prompts_per_step: int = Field(32, ge=1, description="prompts, each a group")
    samples_per_prompt: int = Field(8, ge=1, description="rollouts in a group (G)")
    max_new_tokens: int = Field(1024, ge=1, description="longest response, tokens")
    max_sampling_rounds: int = Field(
        10,
        ge=1,
        description="rounds in which dynamic sampling may look for groups whose rewards differ; then the run ends; "
        "with max_staleness: after so many times prompts_per_step groups in a row without one",
    )
    samplers: int | Literal["auto"] = Field(
        "auto",
        description="processes beside the servers that ask them, decode and check their answers, and keep the routes "
        "in their node's object store; another on each of their nodes grades (docs/asynchronous.md); 0: the controller "
        "does it all; auto: one a server where cluster.address is set and there are several, else 0",
    )
    timeout_s: float = Field(
        600.0, gt=0, description="a server that has requests and gets no further for so long fails the run"
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="versions of the weights by which a token may be older than the step that trains on it; 0: sample, "
        "then train, in turn; from 1 on servers sample while the trainer works",
    )
    ahead: int | None = Field(
        None,
        ge=0,
        description="steps' worth of prompts in flight beyond the step in progress, at most max_staleness; null: 0, 1 "
        "and max_staleness - 1 for max_staleness 0, 1 and more",
    )
    order: Order = Field(
        "finish",
        description="finish: a step takes what has finished, and waits for long answers only when they are due; "
        "admission: strictly in the order of the prompts, without a bias by length, and behind the longest answer",
    )
    group_limit_s: float = Field(
        600.0,
        gt=0,
        description="seconds in which no group that a step waits for gets any further, after which their answers are "
        'cut and graded as they are (finish_reason "time")',
    )
    interrupt: InterruptMode = Field(
        "abort",
        description="answers in flight when new weights come, with max_staleness above 0. abort: they are cut and go "
        "on under the new weights; drain: they are waited for; in_place: they go on over the old keys and values; "
        "retract: those are computed again (docs/interruption.md)",
    )

    @field_validator("samplers")
    @classmethod
    def _samplers_not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError(f"samplers={value} is no number of processes; set rollout.samplers=0 for none")
        return value

    @model_validator(mode="after")
    def _ahead_within_staleness(self) -> Self:
        if self.ahead is not None and self.ahead > self.max_staleness:
            raise ValueError(
                f"ahead={self.ahead} steps of prompts would grow older than max_staleness={self.max_staleness}; set "
                f"rollout.max_staleness={self.ahead} or more, or rollout.ahead lower"
            )
        return self

    @property
    def steps_ahead(self) -> int:
        """`ahead`, or its default."""
        if self.ahead is not None:
            return self.ahead
        return self.max_staleness if self.max_staleness < 2 else self.max_staleness - 1


class TrainConfig(OptimizerConfig):
    """The RL loop and its optimizer."""

    steps: int = Field(100, ge=0, description="RL steps; 0 ends after the supervised steps")
    mini_batches: int = Field(1, ge=1, description="optimizer steps on the rollouts of one step")
    skip_grad_norm_above: float | None = Field(
        None,
        gt=0,
        description="an update whose gradient norm, before clipping, is above this is not made, and its batch is "
        "dumped; null: no such bound",
    )
    skip_grad_norm_times: float | None = Field(
        None,
        gt=1,
        description="the same above so many times the median norm of the last 50 updates with a gradient (5 at least)",
    )


class CriticConfig(OptimizerConfig):
    """The optimizer of the value model, which is there where the objective's advantage is gae."""

    lr: float = Field(1e-5, gt=0, description="learning rate")


class SupervisedConfig(OptimizerConfig):
    """Supervised steps on the task's own answers, before the first rollout."""

    steps: int = Field(0, ge=0, description="0: none")
    batch_size: int = Field(128, ge=1, description="sequences a step")
    lr: float = Field(1e-5, gt=0, description="learning rate")


class ChecksConfig(Frozen):
    """What stops a run."""

    max_abs_logprob: float | None = Field(
        None,
        gt=0,
        description="largest mean |log pi_o - log mu| of a step, nats; beyond it trainer and server hold different "
        "models. null: 1e-3 in float32, 0.1 in bfloat16, 0.3 where precision.rollout_weights rounds",
    )
    first_rollouts: int = Field(
        16,
        ge=0,
        description="rollouts on which trainer and server are compared before the first step, 64 tokens each at most; "
        "0: none",
    )
    scored_rollouts: int = Field(
        2,
        ge=1,
        description="rollouts of a step that each server scores under the newest weights, for the comparison with the "
        "trainer, where rollout.max_staleness is more than 0",
    )
    probe_every: int = Field(
        10, ge=0, description="under R3, steps between two measurements of the mismatch without replay; 0: none"
    )
    probe_rollouts: int = Field(64, ge=1, description="rollouts of such a measurement, and of `sameroute diagnose`")


class ProfileConfig(Frozen):
    """Which steps are traced, and of whom, into profiles/ of the run directory."""

    steps: tuple[PositiveInt, ...] = Field(description="RL steps that are traced; a traced step is slower")
    ranks: tuple[NonNegativeInt, ...] = Field((0,), description="trainer ranks, traced by torch's profiler")
    servers: tuple[NonNegativeInt, ...] = Field((), description="servers, from 0, traced by SGLang's profiler")


class DebugConfig(Frozen):
    """What a run leaves for those who look into it."""

    dump_rollouts: bool | tuple[PositiveInt, ...] = Field(
        False,
        description="write what a step trains on to dumps/, for `sameroute train --from-dump`: true for every step, or "
        "a list of steps",
    )
    profile: ProfileConfig | None = Field(None, description="steps that are traced; null: none")
    stall_s: float | None = Field(
        300.0,
        gt=0,
        description="a wait for ranks or servers that is so long, and three times as long as usual, is a stall: where "
        "every process is goes to stalls/, and who is waited for is said; null: only shortly before a time-out ends "
        "the run",
    )

    def dumps(self, step: int) -> bool:
        """Whether a step is dumped."""
        return self.dump_rollouts if isinstance(self.dump_rollouts, bool) else step in self.dump_rollouts


COLOCATED_FRACTION = 0.75
"""Of a GPU's memory, for a server that takes turns with the trainer: beside it stay that one's CUDA context and
communicators, and its weights while they are sent to a server that was started again or are written."""


class ClusterConfig(Frozen):
    """The machines, and where Ray runs on them. The trainer takes `parallel.ranks` GPUs, rollout servers the rest, or,
    colocated, the same."""

    nodes: int = Field(1, ge=1, description="machines of the run")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of one of them")
    gpu: GPUName | None = Field(
        None, description="kind of GPU, for `sameroute plan`; given, a layout that asks for more GPUs is refused"
    )
    colocated: bool = Field(
        False,
        description="trainer and servers take turns on the GPUs of one machine: whoever waits has given its memory "
        "back, the trainer's lies in the machine's (docs/colocated.md)",
    )
    address: str | None = Field(None, description="of a running Ray cluster; null starts one on this machine")
    price_per_hour: float | None = Field(
        None,
        gt=0,
        description="of one GPU (without GPUs, of one process), in any currency; given, the cost is told",
    )
    join_timeout_s: float = Field(300.0, gt=0, description="nodes of a running cluster that join later fail the run")
    object_store_gb: float | None = Field(
        None,
        gt=0.08,
        description="shared memory of a Ray started here, GB; null: 0.5, or what the routes and tokens of two steps "
        "(and max_staleness more) of the longest answers take, at most half of the shared memory that is free",
    )
    call_timeout_s: float = Field(
        1800.0, gt=0, description="one call to the trainer ranks that takes longer fails the run"
    )
    cpu_threads: int | None = Field(
        None,
        ge=1,
        description="torch threads a trainer rank; null: on the CPU one for a small model (width below 256), whose "
        "matrices lose by more, else the machine's cores divided by the ranks on it, as an offloaded optimizer "
        "beside GPUs gets",
    )
