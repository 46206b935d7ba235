"""Qwen2 and Qwen3; Qwen3-MoE; Qwen2-MoE, of which Qwen1.5-MoE is one: QKV biases, a shared expert behind a gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.hf.families.family import ExpertShape, Family, HFConfig, Sparse, own_head_dim, softmax_router
from megatron_ext.hf.tables import ATTENTION, DENSE_MLP, ENDS, HF_LAYER, LAYER, MOE, Row, gated_mlp
from megatron_ext.hf.transforms import Replicated

_SHARED, _HF_SHARED = LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_expert"
SHARED_EXPERT = (
    *gated_mlp(_SHARED, _HF_SHARED + "."),
    Row(_SHARED + "gate_weight", (_HF_SHARED + "_gate.weight",), Replicated()),
)


def sparse_layers(hf: HFConfig) -> list[int]:
    dense, every = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    return [i for i in range(hf["num_hidden_layers"]) if i not in dense and (i + 1) % every == 0]


def _qwen2(hf: HFConfig) -> dict[str, Any]:
    return {"add_qkv_bias": True}


def _qwen3(hf: HFConfig) -> dict[str, Any]:
    return own_head_dim(hf) | {"qk_layernorm": True}


def _qwen3_moe(hf: HFConfig) -> dict[str, Any]:
    return softmax_router(hf) | {"qk_layernorm": True, "moe_ffn_hidden_size": hf["moe_intermediate_size"]}


def _qwen2_moe(hf: HFConfig) -> dict[str, Any]:
    return softmax_router(hf) | {
        "add_qkv_bias": hf.get("qkv_bias", True),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _output_bias(hf: HFConfig) -> Iterator[str]:
    if hf.get("attention_bias"):
        yield "attention_bias=true (a bias of the attention's output)"


def _chunked(hf: HFConfig) -> Mapping[str, Any]:
    """SGLang's attention in chunks (Qwen2.5-1M): transformers knows none."""
    return {"dual_chunk_attention_config": None}


def _server_alone_qwen2(hf: HFConfig) -> Mapping[str, Any]:
    """SGLang 0.5.23, models/qwen2.py:275 and 426."""
    width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return dict(_chunked(hf)) | {"original_num_attention_heads": hf["hidden_size"] // width, "scale_emb": 1}


def _sparse(shape: ExpertShape) -> HFConfig:
    return {
        "moe_intermediate_size": shape.width,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.topk,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _sparse_qwen2(shape: ExpertShape, qkv_biased: bool) -> HFConfig:
    return _sparse(shape) | {"shared_expert_intermediate_size": shape.shared, "qkv_bias": qkv_biased}


def _sparse_qwen3(shape: ExpertShape, qkv_biased: bool) -> HFConfig:
    return _sparse(shape) | {"attention_bias": False}


QWEN2 = Family((*ENDS, *ATTENTION, *DENSE_MLP), _qwen2, server_ties=True, server_alone=_server_alone_qwen2)
QWEN3 = Family((*ENDS, *ATTENTION, *DENSE_MLP), _qwen3, unsupported=_output_bias, server_ties=True)
QWEN3_MOE = Family(
    (*ENDS, *ATTENTION, *DENSE_MLP, *MOE),
    _qwen3_moe,
    sparse_layers,
    _output_bias,
    experts=("num_experts", "num_local_experts"),
    server_dense=False,
    server_alone=_chunked,
    sparse=Sparse("Qwen3MoeForCausalLM", _sparse_qwen3, qk_norm=True),
)
QWEN2_MOE = Family(
    (*ENDS, *ATTENTION, *DENSE_MLP, *MOE, *SHARED_EXPERT),
    _qwen2_moe,
    sparse_layers,
    experts=("num_experts",),
    rope_types=("default", "llama3"),
    server_dense=False,
    server_heads=False,  # SGLang 0.5.23, models/qwen2_moe.py:917
    server_alone=_chunked,
    sparse=Sparse("Qwen2MoeForCausalLM", _sparse_qwen2, qkv_biased=(False, True), shared=True),
)
