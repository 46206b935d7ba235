"""An RMS norm of all heads of a token as one vector (MiniMax-M2), whose heads lie on the tensor-parallel ranks.

    y = w x r,    r = (sum of x^2 over the heads of all ranks / N + eps)^(-1/2)
    dx = r w dy - x r^3 / N (sum of w x dy over the heads of all ranks),    dw = the tokens' sum of x r dy

Every rank holds the whole of w and takes the part of its heads: Megatron-Core (0.19.2) sums the gradients of whatever
is called q_layernorm or k_layernorm over the tensor-parallel ranks, which is right for parts of one vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.mcore import TransformerConfig, parallel_state


class AllHeadsNorm(torch.nn.Module):
    """In the place of Megatron-Core's norm of one head."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, *, heads: int, **_: Any):
        """hidden_size: of one head. heads: over all ranks."""
        super().__init__()
        self.eps, self.ranks = eps, config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, rows, heads of this rank, head] -> the same; computed in float32 and rounded once, as in SGLang."""
        weight, group = self.weight, None
        if self.ranks > 1:
            weight = weight.chunk(self.ranks)[parallel_state.get_tensor_model_parallel_rank()]
            group = parallel_state.get_tensor_model_parallel_group()
        return _Norm.apply(x.flatten(-2), weight, self.eps, self.weight.numel(), group).view_as(x)


class _Norm(torch.autograd.Function):
    """Keeps x in its own dtype, and one number a token."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, width: int, group: dist.ProcessGroup | None) -> Tensor:
        squares = _summed(x.float().square().sum(-1, keepdim=True), group)
        scale = torch.rsqrt(squares / width + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.width, ctx.group = width, group
        return (x.float() * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, grad = x.float(), grads[0].float()
        to_weight = (wide * scale * grad).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        along = _summed((wide * grad).sum(-1, keepdim=True), ctx.group)
        to_x = scale * grad - wide * (scale**3 / ctx.width * along)
        return to_x.to(x.dtype), to_weight, None, None, None


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
