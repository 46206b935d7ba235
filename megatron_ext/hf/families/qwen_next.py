"""Qwen3-Next: gated delta nets (2412.06464) in most layers, attention behind an output gate in every n-th, a partial
rotation, norms that multiply by 1 + weight, and Qwen2-MoE's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.hf.config_json import rope_settings
from megatron_ext.hf.families.family import Family, HFConfig, own_head_dim, softmax_router
from megatron_ext.hf.families.qwen import SHARED_EXPERT, sparse_layers
from megatron_ext.hf.tables import ATTENTION, DENSE_MLP, ENDS, HF_LAYER, LAYER, MOE, Row
from megatron_ext.hf.transforms import DeltaProjection, DeltaSections, GatedQKV, Replicated, Split

_NET, HF_NET = LAYER + "self_attention.", HF_LAYER + "linear_attn."
_DELTA_NET = (
    Row(_NET + "in_proj.layer_norm_weight", (HF_LAYER + "input_layernorm.weight",), Replicated()),
    Row(_NET + "in_proj.weight", (HF_NET + "in_proj_qkvz.weight", HF_NET + "in_proj_ba.weight"), DeltaProjection()),
    Row(_NET + "conv1d.weight", (HF_NET + "conv1d.weight",), DeltaSections()),
    Row(_NET + "A_log", (HF_NET + "A_log",), Split(0)),
    Row(_NET + "dt_bias", (HF_NET + "dt_bias",), Split(0)),
    Row(_NET + "out_norm.weight", (HF_NET + "norm.weight",), Replicated()),
    Row(_NET + "out_proj.weight", (HF_NET + "out_proj.weight",), Split(1)),
)
_GATED_ATTENTION = tuple(
    Row(row.megatron, row.hf, GatedQKV()) if row.megatron.endswith("linear_qkv.weight") else row for row in ATTENTION
)
_WIDTHS = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)


def _every(hf: HFConfig) -> int:
    """Attention is in every n-th layer: the published file and SGLang say n, transformers says it of every layer.
    Raises KeyError where neither does."""
    types = hf.get("layer_types")
    if types is None or "full_attention" not in types:
        return hf["full_attention_interval"]
    return types.index("full_attention") + 1


def _types(hf: HFConfig) -> list[str]:
    kinds = ("linear_attention", "full_attention")
    return [kinds[(i + 1) % _every(hf) == 0] for i in range(hf["num_hidden_layers"])]


def _fields(hf: HFConfig) -> dict[str, Any]:
    return (
        own_head_dim(hf)
        | softmax_router(hf)
        | {name: hf[name] for name in _WIDTHS}
        | {
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": [int(kind == "linear_attention") for kind in _types(hf)],
            "attention_output_gate": True,
            "qk_layernorm": True,
            "layernorm_zero_centered_gamma": True,
            "moe_ffn_hidden_size": hf["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
        }
    )


def _unsupported(hf: HFConfig) -> Iterator[str]:
    if hf.get("attention_bias"):
        yield "attention_bias=true"
    if not hf.get("attn_output_gate", True):
        yield "attn_output_gate=false"
    if hf.get("output_gate_type") not in (None, "silu", "swish"):
        yield f"output_gate_type={hf['output_gate_type']}"
    if hf.get("layer_types") not in (None, _types(hf)):
        yield "layer_types other than full_attention in every n-th layer and linear_attention in the others"
    if hf.get("full_attention_interval", _every(hf)) != _every(hf):
        yield f"full_attention_interval={hf['full_attention_interval']} and layer_types with one in {_every(hf)}"
    if hf["linear_num_value_heads"] % hf["linear_num_key_heads"]:
        yield (
            f"linear_num_value_heads={hf['linear_num_value_heads']}, which does not divide by "
            f"linear_num_key_heads={hf['linear_num_key_heads']}"
        )
    if "partial_rotary_factor" not in rope_settings(hf):
        yield "a config without partial_rotary_factor"


def _server_fields(hf: HFConfig) -> Mapping[str, Any]:
    rope = rope_settings(hf)
    flat = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
    return flat | {"full_attention_interval": _every(hf)}


QWEN3_NEXT = Family(
    (*ENDS, *_DELTA_NET, *_GATED_ATTENTION, *DENSE_MLP, *MOE, *SHARED_EXPERT),
    _fields,
    sparse_layers,
    _unsupported,
    experts=("num_experts",),
    rotates_parts=True,
    server_dense=False,
    server_fields=_server_fields,
    drafts="mtp.",
)
