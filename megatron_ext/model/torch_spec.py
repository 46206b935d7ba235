"""Megatron-Core's local layer spec, reshaped in place to the Transformer Engine spec's modules and parameter names."""

from __future__ import annotations

import functools

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules

from megatron_ext.cpu.layers import DuplicatedLinear, LayerNormColumnParallelLinear, RMSNorm
from megatron_ext.model.attention import SDPACoreAttention
from megatron_ext.model.top_one import mlp_submodules
from megatron_ext.model.torch_experts import EXPERTS


def without_transformer_engine(spec) -> None:
    """spec: TransformerBlockSubmodules of `get_gpt_decoder_block_spec(..., use_transformer_engine=False)`."""
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs or []:
        parts = layer.submodules
        parts.sharded_state_dict_keys_map = {}
        attention = parts.self_attention.submodules
        attention.core_attention = SDPACoreAttention
        if isinstance(attention, MLASelfAttentionSubmodules):
            parts.input_layernorm = RMSNorm  # two projections read it
            attention.linear_q_down_proj = attention.linear_kv_down_proj = DuplicatedLinear
            attention.linear_q_up_proj = attention.linear_kv_up_proj = LayerNormColumnParallelLinear
            attention.q_layernorm = attention.kv_layernorm = IdentityOp  # fused into the up-projections
        else:
            parts.input_layernorm = IdentityOp  # fused into linear_qkv
            attention.linear_qkv = LayerNormColumnParallelLinear
            if attention.q_layernorm is not IdentityOp:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        mlp = mlp_submodules(parts.mlp)
        if hasattr(mlp, "experts"):
            parts.pre_mlp_layernorm = RMSNorm
            experts, submodules = EXPERTS
            mlp.experts = functools.partial(experts, submodules=submodules)
        else:
            parts.pre_mlp_layernorm = IdentityOp  # fused into linear_fc1
            mlp.linear_fc1 = LayerNormColumnParallelLinear
