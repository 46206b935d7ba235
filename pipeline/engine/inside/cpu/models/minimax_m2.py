"""MiniMax-M2, as SGLang has it, but for its norms of queries and keys, which there are Triton kernels."""

from typing import Any

import torch
from sglang.srt.layers.dp_attention import attn_tp_all_reduce
from sglang.srt.models import minimax_m2
from sglang.srt.models.minimax_m2 import EntryClass

__all__ = ["EntryClass"]


def norm(norms: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MiniMaxM2QKRMSNorm._forward_naive. q, k: [tokens, width of this rank's heads]; the norm is over all ranks'."""
    squares = torch.stack([x.float().square().sum(-1) for x in (q, k)])
    if norms._world_size > 1:
        squares = attn_tp_all_reduce(squares)

    def scaled(x: torch.Tensor, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        factor = torch.rsqrt(squares / (x.shape[-1] * norms._world_size) + norms._eps)
        return (x.float() * factor[:, None] * weight.float()).to(x.dtype)

    return scaled(q, norms._q_norm.weight, squares[0]), scaled(k, norms._k_norm.weight, squares[1])


minimax_m2.MiniMaxM2QKRMSNorm._forward_naive = norm  # pyright: ignore[reportAttributeAccessIssue]
