"""Qwen2-MoE, as SGLang has it, but for the gate of its shared expert, which there is a Triton kernel."""

import torch
from sglang.srt.models import qwen2_moe
from sglang.srt.models.qwen2_moe import EntryClass

__all__ = ["EntryClass"]


def gate_shared_expert(x: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, output: torch.Tensor) -> None:
    """output += sigmoid(x . gate) shared. x: [tokens, hidden]; gate: [hidden]; shared, output: [tokens, hidden]."""
    output.addcmul_(torch.sigmoid(x @ gate.to(x.dtype))[:, None], shared)


qwen2_moe.fused_gate_sigmoid_mul_add = gate_shared_expert
