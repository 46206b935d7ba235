"""The whole configuration: small frozen models, and the checks that span several of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_ext.config import Frozen, LoraConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import describe
from pipeline.config.alerts import AlertsConfig
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.config.data import DataConfig, missing_file
from pipeline.config.model import ModelConfig, TeacherConfig
from pipeline.config.observe import ObserveConfig
from pipeline.config.precision import PrecisionConfig, check_server_arguments, check_trainer_fields
from pipeline.config.replay import Replay
from pipeline.config.rewards import ExactMatchReward, GradingConfig, Rewards, check_memory, check_sources
from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.config.run import (
    ChecksConfig,
    ClusterConfig,
    CriticConfig,
    DebugConfig,
    RolloutConfig,
    RunConfig,
    SupervisedConfig,
    TrainConfig,
)
from pipeline.config.server import CAPTURING, ServerConfig, nodes_of_server, request_tokens, servers_beside
from pipeline.config.sources import RowsConfig, asked_of
from pipeline.config.sources.evaluation import EvaluationSet
from pipeline.config.weights import WeightsConfig
from pipeline.objectives.config import ObjectiveConfig

LOGPROB_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "rounded": 0.3}
"""Nats by the dtype of the weights, or where the server's are rounded; see ChecksConfig.max_abs_logprob."""


_BLACKWELL = ("b200", "b300")


class Config(Frozen):
    """Everything. `device` is one for both engines."""

    run: RunConfig = Field(default_factory=RunConfig)  # pyright: ignore[reportArgumentType]
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    model: ModelConfig
    data: DataConfig
    rewards: Rewards = Field(
        (ExactMatchReward(),),  # pyright: ignore[reportCallIssue]
        description="verifiers, each a mapping with a kind, or in short a kind or package.module:function",
    )
    environment: EnvironmentConfig | None = Field(
        None,
        description="what leads conversations of many turns and gives their reward, in place of verifiers "
        "(docs/environments.md); in short package.module:NAME. null: an answer is one turn",
    )
    grading: GradingConfig = Field(default_factory=GradingConfig)  # pyright: ignore[reportArgumentType]
    evaluate: tuple[EvaluationSet, ...] = Field(
        (), description="sets that are answered during the run, each with a name"
    )
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)  # pyright: ignore[reportArgumentType]
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)  # pyright: ignore[reportArgumentType]
    server: ServerConfig = Field(default_factory=ServerConfig)  # pyright: ignore[reportArgumentType]
    weights: WeightsConfig = Field(default_factory=WeightsConfig)  # pyright: ignore[reportArgumentType]
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)  # pyright: ignore[reportArgumentType]
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)  # pyright: ignore[reportArgumentType]
    lora: LoraConfig | None = Field(
        None, description="adapters of low rank that are trained in the model's place; null: it is trained itself"
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)  # pyright: ignore[reportArgumentType]
    replay: Replay = Field(
        Replay.R3,
        description="r3: the trainer takes the rollout engine's routes; r2: updates take the routes of the proximal "
        "forward pass; none: the trainer routes natively",
    )
    teacher: TeacherConfig | None = Field(
        None, description="who teaches, where objective.distillation is set (docs/distillation.md)"
    )
    supervised: SupervisedConfig = Field(default_factory=SupervisedConfig)  # pyright: ignore[reportArgumentType]
    critic: CriticConfig = Field(default_factory=CriticConfig)  # pyright: ignore[reportArgumentType]
    train: TrainConfig = Field(default_factory=TrainConfig)  # pyright: ignore[reportArgumentType]
    checks: ChecksConfig = Field(default_factory=ChecksConfig)  # pyright: ignore[reportArgumentType]
    debug: DebugConfig = Field(default_factory=DebugConfig)  # pyright: ignore[reportArgumentType]
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)  # pyright: ignore[reportArgumentType]
    observe: ObserveConfig = Field(default_factory=ObserveConfig)  # pyright: ignore[reportArgumentType]
    alerts: AlertsConfig = Field(default_factory=AlertsConfig)  # pyright: ignore[reportArgumentType]
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)  # pyright: ignore[reportArgumentType]

    @field_validator("environment", mode="before")
    @classmethod
    def _environment_in_full(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _together(self):
        self._check_environment()
        self._check_colocated()
        self._check_teacher()
        if self.replay.any:
            self.trainer.check_replay()
        elif self.trainer.replay_floor is not None:
            raise ValueError(
                "trainer.replay_floor refuses replayed experts, and replay=none replays none; set replay=r3 or r2, or "
                "leave trainer.replay_floor out"
            )
        if self.trainer.offload_optimizer and self.precision.weights != "bfloat16":
            raise ValueError(
                "Megatron-Core offloads the optimizer of bfloat16 weights only; set precision.weights=bfloat16, or "
                "trainer.offload_optimizer=false"
            )
        if self.lora is not None and (problem := self.lora.conflict(self.trainer.extra)) is not None:
            raise ValueError(f"lora: {problem}, or leave lora out")
        if self.device != "auto":  # that of `auto` is known where the run is
            self.precision.check_device(self.device)
            if self.device == "cuda":
                self.check_server_kernels()
        if self.rollout.prompts_per_step % self.train.mini_batches:
            raise ValueError(
                f"{self.rollout.prompts_per_step} prompts do not divide into {self.train.mini_batches} mini-batches; "
                "change rollout.prompts_per_step or train.mini_batches"
            )
        if self.precision.min_p > 0 and self.server.deterministic:
            raise ValueError(
                "SGLang's scheduler dies of min_p with seeds; set precision.min_p=0, or server.deterministic=false"
            )
        check_server_arguments(self.server.extra_args)
        check_trainer_fields(self.trainer.extra)
        objective = self.objective.composition()
        if self.rollout.samples_per_prompt == 1 and objective.needs_group:
            raise ValueError(
                "a group of one rollout has no advantage over itself; set rollout.samples_per_prompt to at least 2, or "
                "objective.advantage to gae or batch_std"
            )
        if self.cluster.gpu is not None and self.train.steps:  # supervised steps alone start no server
            self._check_room()
        check_memory(self.rewards, self.grading)
        if self.rollout.max_staleness and not self.objective.guards_staleness:
            raise ValueError(
                f"rollout.max_staleness={self.rollout.max_staleness} trains on tokens of older weights, and "
                f"objective.preset={self.objective.preset} has no correction for that; set objective.correction="
                "'{kind: token_tis}' (geometric_tis where the ratio is of sequences), or objective.correction=none to "
                "train without one"
            )
        self._check_profile()
        if self.run.rollback_after is not None and not (self.run.max_restarts and self.checkpoint.every_steps):
            raise ValueError(
                f"run.rollback_after={self.run.rollback_after} goes back to a checkpoint as a restart; set "
                "checkpoint.every_steps, and run.max_restarts to 1 or more"
            )
        self._check_sources()
        self._check_evaluation()
        longest = request_tokens(self.data.max_prompt_tokens, self.longest_answer)
        for name in ("context_length", "max_total_tokens"):
            room = getattr(self.server, name)
            if room is not None and longest > room:
                raise ValueError(
                    f"data.max_prompt_tokens={self.data.max_prompt_tokens} and {self.longest_from}="
                    f"{self.longest_answer} do not fit server.{name}={room}: SGLang, which keeps two tokens "
                    f"for itself, would cut answers; set that to {longest} or more"
                )
        if self.model.tiny is not None:
            self.parallel.check_model(describe(self.model.tiny.hf_config()))
        return self

    def _check_room(self) -> None:
        """Raise ValueError where the trainer leaves no room for a server, or that has no way for its weights."""
        cluster, size = self.cluster, self.server.tensor_parallel
        span = nodes_of_server(size, cluster.gpus_per_node)
        if not servers_beside(self.rollout_gpus, size, cluster.gpus_per_node):
            raise ValueError(
                f"{cluster.nodes} x {cluster.gpus_per_node} GPUs less parallel.ranks={self.parallel.ranks}"
                f"{f' and {self.teacher_gpus} of the teacher' if self.teacher_gpus else ''} leave "
                f"{self.rollout_gpus} for a server of server.tensor_parallel={size}"
                f"{f', which spans {span} machines' if span > 1 else ''}; set cluster.nodes higher or "
                "parallel.ranks lower"
            )
        if span > 1 and self.weights.transport == "shared_memory":
            raise ValueError(
                f"weights.transport=shared_memory reaches one machine, and a server of server.tensor_parallel={size} "
                f"spans {span}; set weights.transport=distributed"
            )

    def check_server_kernels(self) -> None:
        """Raise ValueError where SGLang on GPUs would not tell the experts, or would round as the trainer does not."""
        runner = self.server.moe_runner
        if self.replay == Replay.R3 and runner is not None and runner not in CAPTURING:
            raise ValueError(
                f"server.moe_runner={runner} is not known to tell the experts of each token, which replay=r3 needs; "
                f"set one of {', '.join(CAPTURING)}, or leave it out"
            )
        backend = self.precision.cache_backend(self.server.attention_backend)
        if backend == "fa3" and self.cluster.gpu in _BLACKWELL:
            raise ValueError(
                f"FlashAttention 3 (fa3) does not run on {self.cluster.gpu}; set precision.kv_cache=same, and leave "
                "server.attention_backend out"
            )

    def _check_colocated(self) -> None:
        """Raise ValueError for what engines that take turns cannot do."""
        cluster, rollout, wrong = self.cluster, self.rollout, None
        if not cluster.colocated:
            return
        if rollout.max_staleness:
            wrong = f"rollout.max_staleness={rollout.max_staleness} samples while the trainer works", "set it to 0"
        elif rollout.interrupt not in ("abort", "drain"):
            wrong = (
                f"rollout.interrupt={rollout.interrupt} keeps answers in the servers' memory, which they give back",
                "set it to abort or drain",
            )
        elif cluster.nodes > 1 or cluster.address is not None:
            wrong = (
                f"cluster.nodes={cluster.nodes}, cluster.address={cluster.address} ask for a cluster, and turns are "
                "taken on one machine",
                "set cluster.nodes=1 and cluster.address=null",
            )
        elif self.weights.transport == "distributed":
            wrong = (
                "weights.transport=distributed makes a group of trainer and servers, and NCCL takes one process a GPU",
                "set weights.transport=shared_memory",
            )
        if wrong is not None:
            raise ValueError(f"cluster.colocated: {wrong[0]}; {wrong[1]}, or cluster.colocated=false")

    def _check_teacher(self) -> None:
        """Raise ValueError where objective and teacher do not go together, or it cannot score as the run samples."""
        teacher, cells = self.teacher, self.objective.composition()
        if (teacher is None) == cells.needs_teacher:
            raise ValueError(
                "objective.distillation learns from a teacher, and there is none; write the section teacher"
                if teacher is None
                else "teacher scores what nobody learns from; write objective.distillation, or leave teacher out"
            )
        if teacher is None:
            return
        check_server_arguments(teacher.server.extra_args)
        if self.precision.masks_sampling:
            raise ValueError(
                "a teacher's log-probs are over the whole vocabulary, and sampling keeps a part of it; set "
                "precision.top_p=1, top_k=-1 and min_p=0"
            )
        if teacher.url is not None and self.precision.temperature != 1:
            raise ValueError(
                f"the server of teacher.url scores at temperature 1, and precision.temperature="
                f"{self.precision.temperature:g} is the run's; set that to 1, or teacher.path in place of teacher.url"
            )
        if self.cluster.colocated and teacher.engine == "server" and teacher.url is None:
            raise ValueError(
                "cluster.colocated: engines take turns on the GPUs, and a teacher's server would keep its own; set "
                "teacher.engine=trainer, teacher.url, or cluster.colocated=false"
            )
        if teacher.engine == "trainer" and cells.teacher_top:
            raise ValueError(
                f"objective.distillation.top_k={cells.teacher_top} is asked of a server; set teacher.engine=server, or "
                "top_k=0"
            )

    def _check_environment(self) -> None:
        if self.environment is None:
            return
        default = type(self).model_fields["rewards"].default
        if self.rewards != default or any(one.rewards is not None for one in self.evaluate):
            raise ValueError("environment gives the reward, of evaluations too; leave out rewards, or environment")
        if self.rollout.max_new_tokens > self.environment.max_tokens:
            raise ValueError(
                f"a turn may have rollout.max_new_tokens={self.rollout.max_new_tokens}, and the whole conversation "
                f"environment.max_tokens={self.environment.max_tokens}; raise that, or lower a turn's"
            )

    def _check_profile(self) -> None:
        profile = self.debug.profile
        if profile is None:
            return
        for name, chosen, least, most in (
            ("steps", profile.steps, 1, self.train.steps),
            ("ranks", profile.ranks, 0, self.parallel.ranks - 1),
            ("servers", profile.servers, 0, math.inf if self.server.replicas is None else self.server.replicas - 1),
        ):
            if wrong := [n for n in chosen if n > most]:
                raise ValueError(f"debug.profile.{name} names {wrong[0]}, and this run has {least} to {most}")

    def _check_sources(self) -> None:
        own = asked_of(self.data.origins)
        sets = {one.name: asked_of(one.sources) or own for one in self.evaluate}
        inherited = [name for one in self.evaluate if one.rewards is None for name in sets[one.name]]
        check_sources(self.rewards, [*own, *inherited], [*own, *inherited])
        for one in self.evaluate:
            if one.rewards is not None:
                check_sources(one.rewards, sets[one.name], sets[one.name])

    def _check_evaluation(self) -> None:
        names = [one.name for one in self.evaluate]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sets of evaluate are called {twice!r}; give one of them another name")
        endless = any(not isinstance(source, RowsConfig) for source in self.data.origins)
        for one in self.evaluate:
            check_memory(one.rewards or (), self.grading)
            if not one.sources and one.prompts is None and endless:
                raise ValueError(f"evaluate: the run's data has no end; say how many `prompts` the set {one.name} asks")
            if one.min_p > 0 and self.server.deterministic:
                raise ValueError(
                    f"SGLang's scheduler dies of min_p with seeds; set min_p=0 for the set {one.name}, or "
                    "server.deterministic=false"
                )
        best = self.checkpoint.best
        if best is None:
            return
        there = [f"eval/{one.name}/{score}" for one in self.evaluate for score in one.scores]
        if best.score not in there:
            raise ValueError(
                f"checkpoint.best.score={best.score} is no score of this run; "
                + (f"there are {', '.join(there)}" if there else "write a set under evaluate")
            )
        if self.checkpoint.every_steps is None:
            raise ValueError("checkpoint.best keeps a checkpoint, and there are none; set checkpoint.every_steps")

    @property
    def missing_file(self) -> Path | None:
        """The first data file, of training or of an evaluation, that is not there."""
        return missing_file([*self.data.origins, *(source for one in self.evaluate for source in one.sources)])

    @property
    def longest_answer(self) -> int:
        """Tokens, of a rollout or of an evaluation."""
        return max([self.longest_rollout, *(one.max_new_tokens or 0 for one in self.evaluate)])

    @property
    def longest_rollout(self) -> int:
        """Tokens after a prompt that a step may train on: of an answer, or of a conversation."""
        return self.rollout.max_new_tokens if self.environment is None else self.environment.max_tokens

    @property
    def longest_from(self) -> str:
        """The field that `longest_answer` is of."""
        if self.longest_answer != self.longest_rollout:
            return "max_new_tokens of evaluate"
        return "rollout.max_new_tokens" if self.environment is None else "environment.max_tokens"

    @property
    def rollout_gpus(self) -> int:
        """GPUs of the cluster that servers may take: those that the trainer does not, or, by turns, all."""
        every = self.cluster.nodes * self.cluster.gpus_per_node
        return every if self.cluster.colocated else every - self.parallel.ranks - self.teacher_gpus

    @property
    def teacher_gpus(self) -> int:
        """GPUs that a teacher's servers take."""
        teacher = self.teacher
        if teacher is None or teacher.engine != "server" or teacher.url is not None:
            return 0
        return (teacher.server.replicas or 1) * teacher.server.tensor_parallel

    def proximal_pass(self, replay: Replay) -> bool:
        """Whether an update begins with a forward pass of its own for log pi_o.

        Several mini-batches move the policy away from it; R2 records its routes; a KL in the reward and a second moment
        read it. Else the first mini-batch is the whole update, and its forward pass is the proximal one.
        replay: of the model.
        """
        read = self.objective.composition().needs_proximal
        return self.train.mini_batches > 1 or replay.from_proximal or read

    @property
    def logprob_bound(self) -> float:
        """Nats; see ChecksConfig.max_abs_logprob."""
        rounds = self.precision.rollout_weights != "same"
        return self.checks.max_abs_logprob or LOGPROB_BOUNDS["rounded" if rounds else self.precision.weights]
