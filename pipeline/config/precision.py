"""Precision is one contract: what both engines compute with, in one block of the configuration.

A difference between the engines is a mismatch in every log-prob, so nothing here can be set for one of them alone; what
cannot be had on both is refused. `docs/precision.md` holds the measured effect of each setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_ext.config import TrainerPrecision

ROUTER_VARIABLE = "SAMEROUTE_ROUTER"
"""What `engine.inside.router` looks for in the environment of SGLang's processes."""
TEMPERATURE_VARIABLE = "SAMEROUTE_LOGIT_TEMPERATURE"
"""The same of `engine.inside.scaled_logits`."""

RolloutWeights = Literal["same", "int8", "fp8"]

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of processors that multiply bf16 themselves: x86's two, and Arm's."""

_MOST_KEPT = 4096
_TIES = 64  # tokens as likely as the last one that top_k keeps may be kept beside it

_CACHE_BACKENDS: dict[str, tuple[str, ...]] = {"fp8_e4m3": ("fa3",), "fp8_e5m2": ()}
"""Attention backends of SGLang (0.5.23) that compute with such a cache what the trainer can: query, keys and values are
rounded, without a scale, for every token. fa3 does so (layers/attention/flashattention_backend.py:1436). triton rounds
the query of a prompt with a cached beginning alone, and no key of its other tokens (kernels/ops/attention/
extend_attention.py:619); flashinfer never rounds a query; trtllm_mha has not been read to its end."""

_SERVER_FLAGS = {
    "--dtype": "weights",
    "--kv-cache-dtype": "kv_cache",
    "--quantization": "rollout_weights",
    "--quantization-param-path": "kv_cache",
    "--modelopt-quant": "rollout_weights",
    "--torchao-config": "rollout_weights",
    "--enable-fp32-lm-head": "head",
    "--rl-on-policy-target": "head",
    "--enable-tf32-matmul": "weights",
    "--sampling-mask-max-tokens": "top_k",
}
"""What of SGLang's command line belongs to the block, and to which field."""

_MCORE_FIELDS = {
    "params_dtype": "weights",
    "pipeline_dtype": "weights",
    "autocast_dtype": "weights",
    "enable_autocast": "weights",
    "bf16": "weights",
    "fp16": "weights",
    "fp8": "weights",
    "fp4": "weights",
    "moe_router_dtype": "router",
}
"""The same of Megatron-Core's TransformerConfig."""

MOVED = {
    "trainer.dtype": "weights",
    "trainer.params_dtype": "weights",
    "trainer.weights": "weights",
    "trainer.head": "head",
    "trainer.lm_head": "head",
    "trainer.router_dtype": "router",
    "trainer.temperature": "temperature",
    "server.dtype": "weights",
    "server.kv_cache_dtype": "kv_cache",
    "server.quantization": "rollout_weights",
    "server.enable_fp32_lm_head": "head",
    "server.fp32_lm_head": "head",
    "rollout.dtype": "weights",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.top_k": "top_k",
    "rollout.min_p": "min_p",
}
"""Keys that one would look for elsewhere, by the field of the block that sets both engines."""


class PrecisionConfig(TrainerPrecision):
    """The block `precision:`. The trainer reads the fields that it inherits, the server all of them."""

    rollout_weights: RolloutWeights = Field(
        "same",
        description="what the server computes with: int8 and fp8 are the trainer's weights rounded on their way, one "
        "scale a row, and held in the dtype of `weights`",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass that sampling keeps")
    top_k: int = Field(-1, description="tokens that sampling keeps at most; -1: all")
    min_p: float = Field(0.0, ge=0, lt=1, description="sampling keeps what is this likely against the likeliest")

    @model_validator(mode="after")
    def _on_both_engines(self):
        if self.weights == "float32" and self.head != "fp32":
            raise ValueError(
                f"SGLang has no {self.head} head on float32 weights, so only the trainer would round; set head=fp32, "
                "or weights=bfloat16"
            )
        if self.weights == "float32" and self.router != "fp32":
            raise ValueError("float32 weights make float32 router logits; set router=fp32, or weights=bfloat16")
        if self.masks_sampling and not 2 <= self.top_k <= _MOST_KEPT:
            raise ValueError(
                f"SGLang tells which tokens top-p, top-k and min-p kept only where top_k is 2 to {_MOST_KEPT}, and "
                "without them the trainer's log-probs would be of another distribution; set top_k to at most that "
                "(a vocabulary may be smaller), or top_p=1, top_k=-1 and min_p=0"
            )
        return self

    @property
    def masks_sampling(self) -> bool:
        """Whether sampling is from a part of the vocabulary, over which every log-prob is then taken."""
        return self.top_p < 1.0 or self.top_k != -1 or self.min_p > 0.0

    def server_arguments(self) -> list[str]:
        """Its part of SGLang's command line (0.5.23)."""
        arguments = ["--dtype", self.weights]
        if self.kv_cache != "same":
            arguments += ["--kv-cache-dtype", self.kv_cache]
        if self.head != "bf16":
            # Of bf16 weights: on a GPU a bf16 matmul with a float32 result, on a CPU a float32 matmul. Products of two
            # bf16 numbers are exact in float32, so these, fp32_accumulate and fp32 differ in the order of sums alone.
            arguments.append("--enable-fp32-lm-head")
        if self.masks_sampling:
            arguments += ["--sampling-mask-max-tokens", str(self.top_k + _TIES)]
        return arguments

    def cache_backend(self, backend: str | None) -> str | None:
        """The attention backend of a server on a GPU: the one asked for, or None for SGLang's own choice.

        Raises ValueError where it computes with such a cache what the trainer does not.
        """
        known = _CACHE_BACKENDS.get(self.kv_cache)
        if known is None:
            return backend
        if not known:
            raise ValueError(
                f"no attention backend of SGLang is known that rounds as the trainer does for precision.kv_cache="
                f"{self.kv_cache}; set precision.kv_cache=fp8_e4m3, or same"
            )
        if backend is not None and backend not in known:
            raise ValueError(
                f"server.attention_backend={backend} is not known to round a {self.kv_cache} cache and its queries as "
                f"the trainer does; set server.attention_backend={' or '.join(known)}, or precision.kv_cache=same"
            )
        return backend or known[0]

    def server_environment(self) -> dict[str, str]:
        """What its processes find in their environment."""
        # Of tokens before a convolution SGLang keeps bfloat16, whatever the activations are.
        states = {"SGLANG_MAMBA_CONV_DTYPE": self.weights}
        # Float32 weights make such logits by themselves.
        return states | ({ROUTER_VARIABLE: "fp32"} if self.router == "fp32" and self.weights != "float32" else {})

    def check_device(self, device: Literal["cpu", "cuda"]) -> None:
        """Raise ValueError for what the engines do not have on this device."""
        if device == "cuda" and self.weights == "float32":
            # SGLang 0.5.23: FlashAttention 3 takes no float32, and Triton's expert kernel multiplies float32 in TF32.
            # Transformer Engine: no float32 attention with context parallelism, and its matrix products use TF32.
            raise ValueError(
                "precision.weights=float32, the default, cannot be had on a GPU: FlashAttention refuses it, and "
                "Triton's experts and Transformer Engine would compute it in TF32, each in its own way; set "
                "precision.weights=bfloat16, or device=cpu"
            )
        if device == "cpu" and self.kv_cache.startswith("fp8"):
            raise ValueError(
                f"SGLang's {self.kv_cache} cache does not run on this CPU; set precision.kv_cache to same or bfloat16"
            )

    def slow_on(self, device: Literal["cpu", "cuda"], cpuinfo: Path = _CPUINFO) -> str | None:
        """Why this is slow on the device, and what to set instead; None where it is not, or where nothing tells.

        Without bf16 arithmetic torch takes bf16 matrices apart in the program: measured on an AMD EPYC with AVX-512, 8
        GFLOP/s where float32 has 58."""
        if device == "cuda" or self.weights != "bfloat16" or not cpuinfo.is_file():
            return None
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if flags is None or _BF16_FLAGS & set(flags[1].split()):
            return None
        return (
            "precision.weights=bfloat16 is several times slower than float32 on this processor, which has no bf16 "
            "arithmetic; set precision.weights=float32, unless it is rounding that you want to see"
        )


def check_server_arguments(arguments: Iterable[str]) -> None:
    """Raise ValueError where SGLang arguments would set the server apart from the trainer."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        # argparse takes an unambiguous beginning for the whole
        known = next((f for f in _SERVER_FLAGS if len(flag) > 3 and f.startswith(flag)), None)
        if known is not None:
            raise ValueError(
                f"server.extra_args: {flag} would set the server apart from the trainer; set "
                f"precision.{_SERVER_FLAGS[known]}, which sets both"
            )


def check_trainer_fields(fields: dict[str, Any]) -> None:
    """The same for fields of Megatron-Core's TransformerConfig."""
    for name in fields:
        if name in _MCORE_FIELDS:
            raise ValueError(
                f"trainer.extra: {name} would set the trainer apart from the server; set "
                f"precision.{_MCORE_FIELDS[name]}, which sets both"
            )
