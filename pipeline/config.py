"""The whole configuration: YAML into small frozen models, fields overridden as `a.b=c`, checked before anything starts.

Classes stand beside what they configure; this file composes them and holds the checks that span several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.config import model_shape, read_hf_config
from pipeline.checkpoints import CheckpointConfig
from pipeline.config_file import ConfigError, read_tree
from pipeline.data.prompts import DataConfig
from pipeline.data.tiny_model import TinyModelConfig
from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.observe.alerts import AlertsConfig
from pipeline.observe.sinks import ObserveConfig
from pipeline.precision import MOVED, PrecisionConfig, check_server_arguments, check_trainer_fields
from pipeline.rollout.server import ServerConfig
from pipeline.weights.config import WeightsConfig

GPU = Literal["a100", "h100", "h200", "b200", "b300"]

LOGPROB_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "rounded": 0.3}
"""Nats by the dtype of the weights, or where the server's are rounded; see ChecksConfig.max_abs_logprob."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(_Frozen):
    """Where a run leaves its files, and what makes it repeatable."""

    directory: Path = Field(Path("runs/run"), description="run directory, made by the run")
    overwrite: bool = Field(
        False,
        description="delete a run that is already there, unless --resume is given; false: resume it from its newest "
        "checkpoint where it has one, else refuse",
    )
    seed: int = Field(0, ge=0, description="of weights, prompts and sampling")
    rollouts_shown: int = Field(4, ge=0, description="sampled rollouts written in readable form, each step")


class ModelConfig(_Frozen):
    """The model: a Hugging Face directory, or a tiny one made on the spot."""

    path: Path | None = Field(None, description="Hugging Face model directory")
    tiny: TinyModelConfig | None = Field(None, description="make a random Qwen3 or Qwen3-MoE of this shape instead")

    @model_validator(mode="after")
    def _one(self):
        if (self.path is None) == (self.tiny is None):
            raise ValueError(
                "give exactly one of model.path (a Hugging Face directory) and model.tiny (made on the spot)"
            )
        return self


class RolloutConfig(_Frozen):
    """What is sampled each step."""

    prompts_per_step: int = Field(32, ge=1, description="prompts, each a group")
    samples_per_prompt: int = Field(8, ge=1, description="rollouts in a group (G)")
    max_new_tokens: int = Field(1024, ge=1, description="longest response, tokens")
    max_sampling_rounds: int = Field(
        10,
        ge=1,
        description="rounds in which dynamic sampling may look for groups whose rewards differ; then the run ends",
    )
    timeout_s: float = Field(600.0, gt=0, description="one request that takes longer fails the run")


class TrainConfig(OptimizerConfig):
    """The RL loop and its optimizer."""

    steps: int = Field(100, ge=0, description="RL steps; 0 ends after the supervised steps")
    mini_batches: int = Field(1, ge=1, description="optimizer steps on the rollouts of one step")


class CriticConfig(OptimizerConfig):
    """The optimizer of the value model, which is there where the objective's advantage is gae."""

    lr: float = Field(1e-5, gt=0, description="learning rate")


class SupervisedConfig(OptimizerConfig):
    """Supervised steps on the task's own answers, before the first rollout."""

    steps: int = Field(0, ge=0, description="0: none")
    batch_size: int = Field(128, ge=1, description="sequences a step")
    lr: float = Field(1e-5, gt=0, description="learning rate")


class ChecksConfig(_Frozen):
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
    probe_every: int = Field(
        10, ge=0, description="under R3, steps between two measurements of the mismatch without replay; 0: none"
    )
    probe_rollouts: int = Field(64, ge=1, description="rollouts of such a measurement, and of `sameroute diagnose`")


class DebugConfig(_Frozen):
    """What a run leaves for those who look into it."""

    dump_rollouts: bool | tuple[PositiveInt, ...] = Field(
        False,
        description="write what a step trains on to dumps/, for `sameroute train --from-dump`: true for every step, or "
        "a list of steps",
    )

    def dumps(self, step: int) -> bool:
        """Whether a step is dumped."""
        return self.dump_rollouts if isinstance(self.dump_rollouts, bool) else step in self.dump_rollouts


class ClusterConfig(_Frozen):
    """The machines, and where Ray runs on them. The trainer takes `parallel.ranks` GPUs, rollout servers the rest."""

    nodes: int = Field(1, ge=1, description="machines of the run")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of one of them")
    gpu: GPU | None = Field(
        None, description="kind of GPU, for `sameroute plan`; given, a layout that asks for more GPUs is refused"
    )
    address: str | None = Field(None, description="of a running Ray cluster; null starts one on this machine")
    join_timeout_s: float = Field(300.0, gt=0, description="nodes of a running cluster that join later fail the run")
    object_store_gb: float = Field(0.5, gt=0.08, description="shared memory of a Ray started here, GB")
    call_timeout_s: float = Field(
        1800.0, gt=0, description="one call to the trainer ranks that takes longer fails the run"
    )
    cpu_threads: int = Field(1, ge=1, description="torch threads a trainer rank; small matrices lose by more")


class Config(_Frozen):
    """Everything. `device` is one for both engines."""

    run: RunConfig = Field(default_factory=RunConfig)  # pyright: ignore[reportArgumentType]
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    model: ModelConfig
    data: DataConfig
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)  # pyright: ignore[reportArgumentType]
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)  # pyright: ignore[reportArgumentType]
    server: ServerConfig = Field(default_factory=ServerConfig)  # pyright: ignore[reportArgumentType]
    weights: WeightsConfig = Field(default_factory=WeightsConfig)  # pyright: ignore[reportArgumentType]
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)  # pyright: ignore[reportArgumentType]
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)  # pyright: ignore[reportArgumentType]
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)  # pyright: ignore[reportArgumentType]
    replay: Literal["none", "r2", "r3"] = Field(
        "r3",
        description="r3: the trainer takes the rollout engine's routes; r2: updates take the routes of the proximal "
        "forward pass; none: the trainer routes natively",
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

    @model_validator(mode="after")
    def _together(self):
        if self.replay != "none":
            self.trainer.check_replay()
        if self.trainer.offload_optimizer and self.precision.weights != "bfloat16":
            raise ValueError(
                "Megatron-Core offloads the optimizer of bfloat16 weights only; set precision.weights=bfloat16, or "
                "trainer.offload_optimizer=false"
            )
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
        objective = resolve(self.objective)
        if self.rollout.samples_per_prompt == 1 and objective.needs_group:
            raise ValueError(
                "a group of one rollout has no advantage over itself; set rollout.samples_per_prompt to at least 2, or "
                "objective.advantage to gae or batch_std"
            )
        server = self.server.tensor_parallel if self.train.steps else 0  # supervised steps alone start none
        if self.cluster.gpu is not None and self.rollout_gpus < server:
            cluster = self.cluster
            raise ValueError(
                f"{cluster.nodes} x {cluster.gpus_per_node} GPUs less parallel.ranks={self.parallel.ranks} leave "
                f"{self.rollout_gpus} for a server of server.tensor_parallel={server}; set cluster.nodes higher or "
                "parallel.ranks lower"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.server.context_length:
            raise ValueError(
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} and rollout.max_new_tokens="
                f"{self.rollout.max_new_tokens} do not fit server.context_length={self.server.context_length}; "
                f"set that to {longest} or more"
            )
        if self.model.tiny is not None:
            self.parallel.check_model(self.model.tiny.hf_config())
        return self

    @property
    def rollout_gpus(self) -> int:
        """GPUs of the cluster that the trainer does not take."""
        return self.cluster.nodes * self.cluster.gpus_per_node - self.parallel.ranks

    @property
    def logprob_bound(self) -> float:
        """Nats; see ChecksConfig.max_abs_logprob."""
        rounds = self.precision.rollout_weights != "same"
        return self.checks.max_abs_logprob or LOGPROB_BOUNDS["rounded" if rounds else self.precision.weights]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and its bases, apply overrides of the form `a.b=c` (c is YAML), validate.

    Raises ConfigError: file missing, not YAML, unknown key, wrong type, or settings that do not go together.
    """
    config, _ = _read(path, overrides)
    if config.model.path is not None:
        _check_model(config, config.model.path)
    return config


def load_config_and_model(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """The same where the model need not be on this machine, for plans and dry runs, with the model's config.json.

    Where there is no directory `model.path`, the `config.json` beside the YAML file counts, or beside its nearest base
    that has one. Raises ConfigError as load_config does, and where there is none.
    """
    config, files = _read(path, overrides)
    if config.model.tiny is not None:
        return config, config.model.tiny.hf_config()
    assert config.model.path is not None
    places = [config.model.path, *(file.parent for file in files)]
    place = next((p for p in places if (p / "config.json").is_file()), config.model.path)
    return config, _check_model(config, place)


def _read(path: str | Path, overrides: list[str] | None) -> tuple[Config, list[Path]]:
    tree, files = read_tree(Path(path))
    for override in overrides or []:
        _apply(tree, override)
    try:
        return Config.model_validate(tree), files
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _check_model(config: Config, directory: Path) -> dict[str, Any]:
    """config.json of a model that is supported and divides into the layout."""
    try:
        hf = read_hf_config(directory)
        model_shape(hf)
        config.parallel.check_model(hf)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error
    if quantized := hf.get("quantization_config"):
        raise ConfigError(
            f"model.path: SGLang would hold {quantized.get('quant_method')} weights, which the trainer's cannot "
            "replace; write the model in bfloat16 first, with sameroute convert to-megatron and to-hf"
        )
    if hf.get("kv_lora_rank") and config.precision.kv_cache != "same":
        raise ConfigError("the cache of latent attention holds latents, not keys; set precision.kv_cache=same")
    if hf["model_type"] == "gpt_oss" and config.precision.weights != "bfloat16":
        raise ConfigError("SGLang keeps gpt-oss's sinks in bfloat16; set precision.weights=bfloat16")
    if hf["model_type"].startswith("glm4") and config.precision.router != "fp32":
        raise ConfigError("GLM's routers are float32 in SGLang whatever is asked for; set precision.router=fp32")
    return hf


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override reads section.field=value, not {override!r}")
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    node[last] = yaml.safe_load(value)


def _explain(error: ValidationError) -> str:
    """One line a mistake; unknown keys name the ones that exist."""
    lines = []
    for mistake in error.errors():
        where = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            known = _fields_at(mistake["loc"][:-1])
            instead = f"; there are {', '.join(known)}" if known else ""
            if where in MOVED:
                instead = f"; set precision.{MOVED[where]}, which sets both engines"
            lines.append(f"{where}: there is no such key{instead}")
        else:
            lines.append(
                f"{where}: {mistake['msg'].removeprefix('Value error, ')}"
                if where
                else mistake["msg"].removeprefix("Value error, ")
            )
    return "\n".join(lines)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = getattr(field.annotation, "__args__", (field.annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return sorted(getattr(model, "model_fields", {}))
