"""Mixtral: every layer sparse, no shared expert, names of its own for the experts' projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.hf.config_json import rope_settings
from megatron_ext.hf.families.family import ExpertShape, Family, HFConfig, Sparse, own_rope_theta
from megatron_ext.hf.tables import ATTENTION, ENDS, HF_LAYER, LAYER, MOE_NORM, Row, gated_mlp
from megatron_ext.hf.transforms import Replicated

_MOE = HF_LAYER + "block_sparse_moe."


def _fields(hf: HFConfig) -> dict[str, Any]:
    own_rope_theta(hf)
    return {"moe_ffn_hidden_size": hf["intermediate_size"], "moe_router_pre_softmax": False}


def _unsupported(hf: HFConfig) -> Iterator[str]:
    if hf.get("sliding_window") is not None:
        yield "sliding_window"


def _server_alone(hf: HFConfig) -> Mapping[str, Any]:
    """SGLang 0.5.23, models/mixtral.py:174, rounds the base down."""
    return {"rope_theta": int(rope_settings(hf)["rope_theta"])}


def _sparse(shape: ExpertShape, qkv_biased: bool) -> HFConfig:
    return {
        "intermediate_size": shape.width,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.topk,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


MIXTRAL = Family(
    (
        *ENDS,
        *ATTENTION,
        MOE_NORM,
        Row(LAYER + "mlp.router.weight", (_MOE + "gate.weight",), Replicated()),
        *gated_mlp(LAYER + "mlp.experts.", _MOE + "experts.{expert}.", ("w1", "w3", "w2")),
    ),
    _fields,
    moe_layers=lambda hf: range(hf["num_hidden_layers"]),
    unsupported=_unsupported,
    experts=("num_local_experts", "num_experts"),
    rope_types=("default", "llama3"),
    server_rope_types=("default",),  # SGLang 0.5.23, models/mixtral.py:174, hands on the base alone
    server_heads=False,  # models/mixtral.py:150
    server_alone=_server_alone,
    sparse=Sparse("MixtralForCausalLM", _sparse),
)
