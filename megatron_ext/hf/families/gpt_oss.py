"""gpt-oss: attention sinks, a sliding window in some layers, biases everywhere, and a clamped gate (model card, 2.1):

    experts    down((min(gate, c) sigmoid(1.702 min(gate, c))) (clip(up, -c, c) + 1))

All experts of a layer are packed in one tensor of [experts, in, out], gate and up by turns in `out`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ext.hf.config_json import rope_settings
from megatron_ext.hf.families.deepseek import YARN_ALONE
from megatron_ext.hf.families.family import Family, HFConfig, Needed, own_head_dim, own_rope_theta
from megatron_ext.hf.tables import ATTENTION, ENDS, HF_LAYER, LAYER, MOE_NORM, Row
from megatron_ext.hf.transforms import AlternatingGateUp, Replicated, Split, Transposed

_ALPHA = 1.702
_MLP, _HF_MLP = LAYER + "mlp.", HF_LAYER + "mlp."
_EXPERTS, _HF_EXPERTS = _MLP + "experts.linear_", _HF_MLP + "experts."
MOE = (
    MOE_NORM,
    Row(_MLP + "router.weight", (_HF_MLP + "router.weight",), Replicated()),
    Row(_MLP + "router.bias", (_HF_MLP + "router.bias",), Replicated()),
    Row(_EXPERTS + "fc1.weight{expert}", (_HF_EXPERTS + "gate_up_proj",), Transposed(AlternatingGateUp())),
    Row(_EXPERTS + "fc1.bias{expert}", (_HF_EXPERTS + "gate_up_proj_bias",), AlternatingGateUp()),
    Row(_EXPERTS + "fc2.weight{expert}", (_HF_EXPERTS + "down_proj",), Transposed(Split(1))),
    Row(_EXPERTS + "fc2.bias{expert}", (_HF_EXPERTS + "down_proj_bias",), Replicated()),
)


def _layer_types(hf: HFConfig) -> list[str]:
    types = ("sliding_attention", "full_attention")
    return hf.get("layer_types") or [types[i % 2] for i in range(hf["num_hidden_layers"])]


def _fields(hf: HFConfig) -> dict[str, Any]:
    own_rope_theta(hf)
    return (
        own_head_dim(hf)
        | _yarn(rope_settings(hf))
        | {
            "moe_ffn_hidden_size": hf["intermediate_size"],
            "moe_router_pre_softmax": False,  # the softmax is over the chosen experts
            "add_bias_linear": True,
            "bias_dropout_fusion": False,  # Megatron-Core has no such kernel for experts with biases
            "softmax_type": "learnable",
            "window_size": (hf["sliding_window"] - 1, 0),  # tokens seen before and after the query
            "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in _layer_types(hf)],
            "cp_comm_type": "a2a",  # the one way in which Transformer Engine splits a sequence with sinks
            "activation_func": "quick_gelu",
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": hf["swiglu_limit"],
        }
    )


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """YaRN (2309.00071) as transformers computes it."""
    if rope["rope_type"] == "default":
        return {}
    scales = rope.get("mscale") and rope.get("mscale_all_dim")
    return {
        "yarn_rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "yarn_mscale": rope["mscale"] if scales else None,
        "yarn_mscale_all_dim": rope["mscale_all_dim"] if scales else None,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def _unsupported(hf: HFConfig) -> Iterator[str]:
    if not hf.get("attention_bias", True):
        yield "attention_bias=false"
    if hf.get("swiglu_alpha", _ALPHA) != _ALPHA:
        yield f"swiglu_alpha={hf['swiglu_alpha']}"
    if not hf.get("sliding_window"):
        yield "no sliding_window"
    if odd := sorted(set(_layer_types(hf)) - {"sliding_attention", "full_attention"}):
        yield f"layer_types {odd}"
    rope = rope_settings(hf)
    if rope["rope_type"] == "yarn":
        if not rope.get("factor") or "original_max_position_embeddings" not in rope:
            yield "YaRN without factor or original_max_position_embeddings"
        if rope.get("attention_factor") is not None:
            yield "YaRN with attention_factor"


GPT_OSS = Family(
    (*ENDS, *ATTENTION, *MOE),
    _fields,
    moe_layers=lambda hf: range(hf["num_hidden_layers"]),
    unsupported=_unsupported,
    experts=("num_local_experts", "num_experts"),
    rope_types=("default", "yarn"),
    quantization=("mxfp4",),
    # On a GPU, where SGLang keeps sinks in bfloat16, no model has float32 weights.
    needs=(Needed("weights", "float32", "on a CPU gpt-oss is sampled with float32 weights alone", "cpu"),),
    server_alone=lambda hf: YARN_ALONE | {"hidden_act_alpha": _ALPHA},  # SGLang 0.5.23, models/gpt_oss.py:219
    # Its default expects experts transposed, and it keeps windows in a cache of their own: both for GPUs.
    server_cpu_arguments=("--moe-runner-backend", "triton", "--disable-hybrid-swa-memory"),
)
