"""The text model of Qwen3.5-MoE, as SGLang has it, but for its gated delta nets, and for kernels around its attention
and its experts, which need AMX or are Triton's."""

import importlib
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.inside.cpu import delta_nets
from pipeline.engine.inside.cpu.models import qwen2_moe  # noqa: F401  (replaces the gate of the shared expert)

delta_nets.install()
delta_nets.declare(  # it takes them from torch when it is imported
    "fused_sigmoid_mul_cpu", "fused_qk_gemma_rmsnorm_cpu", "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)  # fmt: skip
_model: Any = importlib.import_module("sglang.srt.models.qwen3_5")
EntryClass = importlib.import_module("sglang.srt.models.qwen3_5_text").Qwen3_5MoeForCausalLM


def gate_attention(x: Tensor, gate: Tensor, inplace: bool = True) -> Tensor:
    """x sigmoid(gate), into x. Both [tokens, all heads' values]."""
    return (x if inplace else x.clone()).mul_(torch.sigmoid(gate).view_as(x))


def norm(x: Tensor, weight: Tensor, epsilon: float, width: int) -> Tensor:
    """The norm of each head, times 1 + weight. [tokens, heads width]"""
    wide = x.reshape(*x.shape[:-1], -1, width).float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * (1.0 + weight.float())
    return wide.to(x.dtype).view(x.shape)


def norm_with_gate(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, epsilon: float, width: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries and keys, normalised, and gates). q_gate: [tokens, heads 2 width], each head's query before its gate."""
    q, gate = (part.flatten(1) for part in q_gate.view(-1, heads, 2, width).unbind(2))
    return norm(q, q_weight, epsilon, width), norm(k.contiguous(), k_weight, epsilon, width), gate.contiguous()


def sections(
    qkvz: Tensor, ba: Tensor, key_heads: int, heads: int, key: int, value: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(queries, keys and values; output gates [tokens, heads, value]; betas, decays [tokens, heads])."""
    joined, gates = qkvz.split([2 * key_heads * key + heads * value, heads * value], 1)
    betas, decays = ba.chunk(2, 1)
    return joined.contiguous(), gates.reshape(-1, heads, value), betas.contiguous(), decays.contiguous()


_model.fused_sigmoid_mul = gate_attention
_model.fused_qk_gemma_rmsnorm_with_gate = norm_with_gate
_model.fused_qkvzba_split_reshape_cat_contiguous = sections
_model.RMSNormGated.forward = delta_nets.norm_and_gate
