"""MiniMax-M2: grouped-query attention with a partial rotation, norms of queries and of keys over all heads together,
every layer sparse, DeepSeek-V3's router without groups, and Mixtral's names for the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.hf.config_json import rope_settings
from megatron_ext.hf.families.family import (
    SIGMOID_WITH_BIAS,
    Family,
    HFConfig,
    Needed,
    own_head_dim,
    own_rope_theta,
)
from megatron_ext.hf.tables import ATTENTION, ENDS, HF_LAYER, LAYER, MOE_NORM, Row, gated_mlp
from megatron_ext.hf.transforms import Replicated

_MOE = HF_LAYER + "block_sparse_moe."
_SAYS = {"use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "scoring_func": "sigmoid"}
"""What the published config.json says, SGLang asks for, and transformers takes for granted."""


def _fields(hf: HFConfig) -> dict[str, Any]:
    own_rope_theta(hf)
    return own_head_dim(hf) | SIGMOID_WITH_BIAS | {"qk_layernorm": True, "moe_ffn_hidden_size": hf["intermediate_size"]}


def _unsupported(hf: HFConfig) -> Iterator[str]:
    for name, value in _SAYS.items():
        if hf.get(name, value) != value:
            yield f"{name}={hf[name]}"
    if hf.get("attention_bias"):
        yield "attention_bias=true"
    if hf.get("shared_intermediate_size"):
        yield f"shared_intermediate_size={hf['shared_intermediate_size']}"
    if set(hf.get("attn_type_list") or [1]) != {1}:
        yield "attn_type_list with another attention than 1 (softmax)"


def _server_fields(hf: HFConfig) -> Mapping[str, Any]:
    return _SAYS | {"rotary_dim": round(hf["head_dim"] * rope_settings(hf).get("partial_rotary_factor", 1.0))}


MINIMAX_M2 = Family(
    (
        *ENDS,
        *ATTENTION,
        MOE_NORM,
        Row(LAYER + "mlp.router.weight", (_MOE + "gate.weight",), Replicated()),
        Row(LAYER + "mlp.router.expert_bias", (_MOE + "e_score_correction_bias",), Replicated()),
        *gated_mlp(LAYER + "mlp.experts.", _MOE + "experts.{expert}.", ("w1", "w3", "w2")),
    ),
    _fields,
    moe_layers=lambda hf: range(hf["num_hidden_layers"]),
    unsupported=_unsupported,
    experts=("num_local_experts", "num_experts"),
    rotates_parts=True,
    norm_over_heads=True,
    needs=(Needed("router", "fp32", "MiniMax-M2's routers are float32 in SGLang whatever is asked for"),),
    server_fields=_server_fields,
)
