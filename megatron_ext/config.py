"""What the trainer is told: its precision, the layout of its ranks, its memory, its optimizer. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_ext.hf.description import ModelDescription

Head = Literal["bf16", "fp32_accumulate", "fp32"]
"""How the LM head makes logits; `logprobs.linear_logprobs` says what each rounds."""


_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux's file systems


class Frozen(BaseModel):
    """The base of every part of the configuration: fixed once made, no key that it does not know, no infinite number,
    no truth value for a number, and paths that a file system takes, with ~ for the home directory."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and _is_number(field.annotation):
                raise ValueError(f"{name}={str(value).lower()} is no number")
        return data

    @field_validator("*")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return _usable(value) if isinstance(value, Path) else value


def _is_number(annotation: Any) -> bool:
    """Whether a field holds numbers, or nothing, and no truth value."""
    return set(get_args(annotation) or (annotation,)) <= {int, float, NoneType}


def _usable(path: Path) -> Path:
    """The path, its ~ written out. Raises ValueError for one that no file system takes."""
    if "\0" in str(path):
        raise ValueError("a path has no NUL in it")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts) or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"a name in a path has at most {_LONGEST_NAME} bytes, and a path {_LONGEST_PATH}")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such user's home directory; write the whole path") from error


class TrainerPrecision(Frozen):
    """What the trainer computes with. `pipeline.config.precision` sets it together with the server's; only code that is
    to make the two differ builds one of its own."""

    weights: Literal["float32", "bfloat16"] = Field(
        "float32", description="weights and activations; the optimizer is fp32"
    )
    head: Head = Field("fp32", description="LM head; null: fp32 for float32 weights, fp32_accumulate for bfloat16")
    router: Literal["fp32", "bf16"] = Field("fp32", description="router logits; bf16: as bfloat16 weights make them")
    kv_cache: Literal["same", "bfloat16", "fp8_e4m3", "fp8_e5m2"] = Field(
        "same",
        description="keys and values of the server's cache, and of the trainer's attention, and its queries where the "
        "cache is fp8; same: as activations",
    )
    temperature: float = Field(1.0, gt=0, description="of sampling and of every log-prob")

    @model_validator(mode="before")
    @classmethod
    def _default_head(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("head") is None:
            return fields | {"head": "fp32_accumulate" if fields.get("weights") == "bfloat16" else "fp32"}
        return fields


class ParallelConfig(Frozen):
    """How the trainer's ranks divide the model and the batch. data parallel = ranks / (tensor * pipeline * context)."""

    ranks: int = Field(1, ge=1, description="trainer processes; one a GPU where there are GPUs")
    tensor: int = Field(1, ge=1, description="tensor-parallel ranks")
    sequence: bool = Field(False, description="sequence parallelism among the tensor-parallel ranks")
    pipeline: int = Field(1, ge=1, description="pipeline stages")
    virtual_pipeline: int | None = Field(None, ge=2, description="model chunks a pipeline stage (interleaved)")
    first_stage_layers: int | None = Field(
        None, ge=1, description="layers of the first pipeline stage; null: as many as the others"
    )
    last_stage_layers: int | None = Field(None, ge=1, description="layers of the last pipeline stage, the same")
    context: int = Field(1, ge=1, description="context-parallel ranks")
    expert: int = Field(1, ge=1, description="expert-parallel ranks")
    expert_tensor: int | None = Field(None, ge=1, description="tensor-parallel ranks inside an expert; null: `tensor`")

    @property
    def data(self) -> int:
        """Data-parallel ranks of the dense layers."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @model_validator(mode="after")
    def _sizes(self):
        dense = self.tensor * self.pipeline * self.context
        if self.ranks % dense:
            raise ValueError(
                f"{self.ranks} trainer ranks do not divide into tensor {self.tensor} x pipeline {self.pipeline} x "
                f"context {self.context} = {dense}; set parallel.ranks to a multiple of {dense} or shrink one of them"
            )
        expert_tensor = self.expert_tensor or self.tensor
        expert = expert_tensor * self.expert * self.pipeline
        if self.ranks % expert:
            raise ValueError(
                f"{self.ranks} trainer ranks do not divide into expert_tensor {expert_tensor} x expert {self.expert} x "
                f"pipeline {self.pipeline} = {expert}; set parallel.ranks to a multiple of {expert}, or "
                "parallel.expert_tensor=1"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence parallelism needs tensor parallelism; set parallel.sequence=false")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline > 1; leave parallel.virtual_pipeline out")
        if self.pipeline == 1 and (self.first_stage_layers or self.last_stage_layers):
            raise ValueError("stages of their own size need pipeline > 1; leave parallel.*_stage_layers out")
        return self

    def stage_layers(self, layers: int) -> list[int]:
        """How many layers each pipeline stage has. Raises ValueError where they do not divide."""
        ends = [self.first_stage_layers, self.last_stage_layers]
        stages, left = self.pipeline - sum(e is not None for e in ends), layers - sum(e or 0 for e in ends)
        chunks = self.virtual_pipeline or 1
        if left % (stages * chunks) if stages else left:
            raise ValueError(
                f"the model's {layers} layers do not divide among parallel.pipeline x parallel.virtual_pipeline="
                f"{self.pipeline * chunks}; use a divisor of {layers}, or give the ends layers of their own "
                "(parallel.first_stage_layers, parallel.last_stage_layers)"
            )
        middle = left // stages if stages else 0
        each = [ends[0] or middle, *[middle] * (self.pipeline - 2), ends[1] or middle][: self.pipeline]
        if min(each) < 1 or any(n % chunks for n in each):
            raise ValueError(f"{layers} layers give stages of {each}, with {chunks} chunks each; every chunk needs one")
        return each

    def check_model(self, model: ModelDescription) -> None:
        """Raise ValueError where a model does not divide into this layout."""
        experts = model.num_experts

        def divides(what: str, size: int, by: int, field: str) -> None:
            if size % by:
                raise ValueError(f"the model's {size} {what} do not divide among {field}={by}; use a divisor of {size}")

        divides("attention heads", model.heads, self.tensor, "parallel.tensor")
        divides("key-value heads", model.kv_heads, self.tensor, "parallel.tensor")
        if model.delta_layers:
            for what, size in (("key", model.delta_net.key_heads), ("value", model.delta_net.value_heads)):
                ranks, field = self.tensor * self.context, "parallel.tensor x parallel.context"
                divides(f"{what} heads of its gated delta nets", size, ranks, field)
            if self.tensor > 1 and not self.sequence:
                raise ValueError(
                    "Megatron-Core leaves out gradients of gated delta nets under tensor parallelism without sequence "
                    "parallelism; set parallel.sequence=true"
                )
        self.stage_layers(model.num_layers)
        if experts:
            divides("experts", experts, self.expert, "parallel.expert")
            if self.tensor > 1 and not self.sequence:
                raise ValueError(
                    "Megatron-Core trains a mixture of experts under tensor parallelism only with sequence "
                    "parallelism; set parallel.sequence=true"
                )
        elif self.expert > 1:
            raise ValueError("the model has no experts; set parallel.expert=1")


class OptimizerConfig(Frozen):
    """Adam on Megatron's distributed optimizer."""

    lr: float = Field(1e-6, gt=0, description="learning rate")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps over which the rate rises linearly from 0")
    decay_steps: int | None = Field(
        None, ge=1, description="optimizer steps, warm-up included, until the rate has fallen linearly; null: constant"
    )
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="of `lr`, kept after `decay_steps`")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="largest L2 norm of the whole gradient; 0: no limit")

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step 0, 1, ...: linear warm-up, then constant or linear decay."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.decay_steps is None:
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps))
        return self.lr * (1.0 - (1.0 - self.final_lr_fraction) * progress)

    @model_validator(mode="after")
    def _schedule(self):
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps={self.decay_steps} must exceed warmup_steps={self.warmup_steps}")
        return self


class LoraConfig(Frozen):
    """Adapters of low rank (2106.09685) that are trained in the model's place: W + alpha / rank B A. The names are the
    PEFT library's, `r` and `lora_alpha` and `target_modules` there."""

    rank: int = Field(16, ge=1, description="rows of A, and columns of B; PEFT's r")
    alpha: float = Field(32.0, gt=0, description="the product is taken alpha / rank times; PEFT's lora_alpha")
    targets: Literal["all"] | tuple[str, ...] = Field(
        "all",
        description="projections that have adapters: all, or a list of the model's own names (q_proj, down_proj) and "
        "of groups of them: attention, dense, experts, shared_experts",
    )
    router: Literal["frozen", "trained"] = Field(
        "frozen", description="trained: routers are trained themselves, beside the adapters"
    )

    @property
    def scale(self) -> float:
        """Of the product of B and A."""
        return self.alpha / self.rank

    @field_validator("targets", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all":
            raise ValueError(f"write all, or a list, also of one: [{value}]")
        return value

    @field_validator("targets")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("a list of no projections trains nothing; name some, or write all")
        return value

    @staticmethod
    def conflict(fields: Mapping[str, Any]) -> str | None:
        """What in Megatron-Core's TransformerConfig (0.19.2) goes around the layers that adapters are added to, and
        what to set instead; or None. fields: by TransformerConfig's names."""
        for name, why in _AROUND_LAYERS.items():
            if fields.get(name):
                return f"{why}; leave {name} out of trainer.extra"
        return None


_AROUND_LAYERS = {
    "moe_shared_expert_overlap": "overlapped shared experts gather their tokens outside their layers",
    "use_transformer_engine_op_fuser": "fused operations of Transformer Engine never call the layers themselves",
    "delay_wgrad_compute": "delayed gradients of weights are computed for all of them or none",
}


class TrainerConfig(Frozen):
    """Memory and kernels of the trainer."""

    router_fusion: bool = Field(False, description="Transformer Engine's fused router; it bypasses replay")
    replay_floor: float | None = Field(
        None,
        gt=0,
        le=1,
        description="router replay: refuse a given expert whose live probability is below this times that of the "
        "weakest expert that the router would choose itself, and take one of its own; null: refuse none",
    )
    micro_batch_tokens: int = Field(
        8192, ge=1, description="most tokens of one packed micro-batch, over all context ranks"
    )
    packing: bool = Field(
        True, description="pack sequences into one row; false: a row each, padded to the longest (wasteful; to compare)"
    )
    recompute: Literal["none", "selective", "full"] = Field("none", description="activations recomputed in backward")
    offload_optimizer: bool = Field(
        False, description="Adam's float32 weights and moments in the machine's memory, its step on the CPU"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="further fields of Megatron-Core's TransformerConfig"
    )

    def check_replay(self) -> None:
        """Raise ValueError where routers would not take, or not account for, the routes that they are given."""
        problem = replay_conflict({"moe_router_fusion": self.router_fusion} | self.extra)
        if problem is not None:
            raise ValueError(f"{problem}, or set replay=none")


def replay_conflict(fields: Mapping[str, Any]) -> str | None:
    """What in Megatron-Core's TransformerConfig (0.19.2) goes around replayed routes, and what to set instead; or None.

    fields: by TransformerConfig's names; those that are absent have their defaults.
    """
    if fields.get("moe_router_fusion"):
        return "the fused router returns before replay is consulted; set trainer.router_fusion=false"
    kinds = fields.get("moe_router_load_balancing_type") or "none"
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in ("sinkhorn", "quantile_balancing"):
            return f"{kind} balancing chooses experts itself and never asks for routes; set it to none in trainer.extra"
        if kind != "none":
            return (
                f"{kind} counts the experts of a top-k of its own, not those that replayed tokens went to, so it would "
                "balance another routing; set moe_router_load_balancing_type=none in trainer.extra"
            )
    if fields.get("moe_expert_capacity_factor") is not None:
        return "a capacity factor drops tokens from the experts they are routed to; leave it out of trainer.extra"
    return None
