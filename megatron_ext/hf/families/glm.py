"""GLM-4.5: grouped-query attention with QKV biases, a partial rotation, maybe QK norms; the rest is DeepSeek's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ext.hf.config_json import rope_settings
from megatron_ext.hf.families.deepseek import BIASED_MOE
from megatron_ext.hf.families.family import (
    Family,
    HFConfig,
    Needed,
    ServerRouter,
    dense_first,
    shared_experts,
    sigmoid_router,
    sigmoid_router_unsupported,
)
from megatron_ext.hf.tables import ATTENTION, DENSE_MLP, ENDS


def _fields(hf: HFConfig) -> dict[str, Any]:
    attention = {"qk_layernorm": hf.get("use_qk_norm", False), "add_qkv_bias": hf.get("attention_bias", False)}
    sparse = {"moe_ffn_hidden_size": hf["moe_intermediate_size"]} | sigmoid_router(hf) | shared_experts(hf)
    return attention | sparse


def _unsupported(hf: HFConfig) -> Iterator[str]:
    yield from sigmoid_router_unsupported(hf)
    if "partial_rotary_factor" not in rope_settings(hf):
        yield "a config without partial_rotary_factor"


GLM4_MOE = Family(
    (*ENDS, *ATTENTION, *DENSE_MLP, *BIASED_MOE),
    _fields,
    lambda hf: dense_first(hf | {"moe_layer_freq": 1}),  # neither transformers nor SGLang knows moe_layer_freq here
    _unsupported,
    experts=("n_routed_experts", "num_local_experts"),
    rotates_parts=True,
    needs=(Needed("router", "fp32", "GLM's routers are float32 in SGLang whatever is asked for"),),
    server_router=ServerRouter("glm4_moe.Glm4MoeGate", "float32"),
)
