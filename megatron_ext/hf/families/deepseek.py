"""DeepSeek-V3, Moonlight and Kimi-K2: multi-head latent attention (2405.04434, section 2.1), DeepSeek-V3's router,
shared experts, dense layers first.

Both sides hold the rotary part of a head as interleaved pairs. The norms of the latents take `rms_norm_eps`, as in
SGLang; transformers takes 1e-6 there whatever the config says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.hf.config_json import rope_settings
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
from megatron_ext.hf.tables import DENSE_MLP, ENDS, HF_LAYER, LAYER, MOE, Row, gated_mlp
from megatron_ext.hf.transforms import Replicated, Split

_MLA, _HF_MLA = LAYER + "self_attention.", HF_LAYER + "self_attn."
LATENT_ATTENTION = (
    Row(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), Replicated()),
    Row(_MLA + "linear_q_proj.weight", (_HF_MLA + "q_proj.weight",), Split(0)),  # where q_lora_rank is null
    Row(_MLA + "linear_q_down_proj.weight", (_HF_MLA + "q_a_proj.weight",), Replicated()),
    Row(_MLA + "linear_q_up_proj.layer_norm_weight", (_HF_MLA + "q_a_layernorm.weight",), Replicated()),
    Row(_MLA + "linear_q_up_proj.weight", (_HF_MLA + "q_b_proj.weight",), Split(0)),
    Row(_MLA + "linear_kv_down_proj.weight", (_HF_MLA + "kv_a_proj_with_mqa.weight",), Replicated()),
    Row(_MLA + "linear_kv_up_proj.layer_norm_weight", (_HF_MLA + "kv_a_layernorm.weight",), Replicated()),
    Row(_MLA + "linear_kv_up_proj.weight", (_HF_MLA + "kv_b_proj.weight",), Split(0)),
    Row(_MLA + "linear_proj.weight", (_HF_MLA + "o_proj.weight",), Split(1)),
)
BIASED_MOE = (
    *MOE,
    Row(LAYER + "mlp.router.expert_bias", (HF_LAYER + "mlp.gate.e_score_correction_bias",), Replicated()),
    *gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts."),
)


def latent_fields(hf: HFConfig) -> dict[str, Any]:
    """Latent attention, and experts behind DeepSeek-V3's router."""
    attention = {
        "multi_latent_attention": True,
        "qk_layernorm": True,  # of the latents
        "q_lora_rank": hf["q_lora_rank"],
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "kv_channels": hf["v_head_dim"],
        "num_query_groups": hf["num_attention_heads"],
    }
    sparse = {"moe_ffn_hidden_size": hf["moe_intermediate_size"]} | sigmoid_router(hf) | shared_experts(hf)
    return attention | _rope(rope_settings(hf)) | sparse


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Plain, or YaRN (2309.00071) with DeepSeek's two scales: of the rotation, and of the softmax."""
    plain = {"rotary_base": rope["rope_theta"], "rotary_percent": 1.0, "rotary_scaling_factor": 1.0}
    if rope["rope_type"] == "default":
        return plain | {"rope_type": "rope"}
    return plain | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "mscale": rope.get("mscale") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def latent_unsupported(hf: HFConfig) -> Iterator[str]:
    """Of these two, what is not built here."""
    yield from sigmoid_router_unsupported(hf)
    if hf.get("attention_bias"):
        yield "attention_bias=true"
    if not hf.get("rope_interleave", True):
        yield "rope_interleave=false"
    rope = rope_settings(hf)
    if rope["rope_type"] == "yarn":
        if "original_max_position_embeddings" not in rope:
            yield "YaRN without original_max_position_embeddings"
        if rope.get("attention_factor") is not None or rope.get("truncate") is False:
            yield "YaRN with attention_factor or truncate=false"
        if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
            yield "YaRN with one of mscale and mscale_all_dim"


YARN_ALONE = {"attn_factor": 1, "extrapolation_factor": 1}
"""What SGLang 0.5.23 (layers/rotary_embedding/factory.py) reads of YaRN's settings beyond transformers."""


def server_alone(hf: HFConfig) -> Mapping[str, Any]:
    """SGLang 0.5.23, models/deepseek_v2.py:514, 711, 762, 765, 894 and 3059."""
    none = ("swiglu_limit", "llama_4_scaling", "router_fp32", "routing_method_type")
    return YARN_ALONE | dict.fromkeys(none) | {"num_hash_layers": 0}


LATENT_CACHE = Needed("kv_cache", "same", "the cache of latent attention holds latents, not keys")
DEEPSEEK_V3 = Family(
    (*ENDS, *LATENT_ATTENTION, *DENSE_MLP, *BIASED_MOE),
    latent_fields,
    dense_first,
    latent_unsupported,
    experts=("n_routed_experts", "num_local_experts"),
    rope_types=("default", "yarn"),
    needs=(LATENT_CACHE,),
    server_router=ServerRouter("deepseek_v2.MoEGate", "own"),
    server_ties=True,
    server_alone=server_alone,
    server_fields=lambda hf: {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    # SGLang 0.5.23, models/deepseek_common/deepseek_weight_loader.py:438, where there is a query latent
    joined=((_HF_MLA + "q_a_proj.weight", _HF_MLA + "kv_a_proj_with_mqa.weight"),),
)
