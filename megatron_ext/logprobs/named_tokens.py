"""Log-probs of a few named tokens at each place, beside that of the label, without the logits.

    log p(v) = log p(y) + x_v - x_y,   x_v = h . w_v / T

The label's log-prob has the whole softmax in it, and its gradient too; what is added is of single rows of the head. One
row of weights a token is read at a time, so memory is that of the hidden states.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import Head


class _RowProducts(torch.autograd.Function):
    """h_t . w_(rows of t): [t, h], [vocabulary, h], [t, n] int64 -> [t, n] float32; 0 where a row is negative."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, rows: Tensor, dtype: torch.dtype):
        ctx.save_for_backward(hidden, weight, rows)
        ctx.dtype = dtype
        x = hidden.to(dtype).float()
        out = torch.stack([(x * weight[row.clamp(min=0)].to(dtype)).sum(-1) for row in rows.t()], -1)
        return out.masked_fill(rows < 0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        hidden, weight, rows = ctx.saved_tensors
        x, given = hidden.to(ctx.dtype).float(), gradient.masked_fill(rows < 0, 0.0)
        of_hidden, of_weight = torch.zeros_like(x), torch.zeros(weight.shape, device=weight.device)
        for row, g in zip(rows.clamp(min=0).t(), given.t(), strict=True):
            of_hidden += g[:, None] * weight[row].to(ctx.dtype)
            of_weight.index_add_(0, row, g[:, None] * x)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None, None


class _SumOverRanks(torch.autograd.Function):
    """All ranks compute the same loss from the sum, so the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup):
        out = part.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0], None


def named_logprobs(
    logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tokens: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float,
    head: Head,
) -> Tensor:
    """log softmax(hidden @ weight^T / T)[tokens], [t, k] float32.

    logprobs: [t] of the labels, as `linear_logprobs` gives them, whose other arguments these are. tokens: [t, k] ids of
    the vocabulary; a negative one is taken for none, and its log-prob means nothing.
    The gradient of `hidden` is this rank's part, as there.
    """
    width = len(weight)
    first = 0 if group is None else group.rank() * width
    wanted = torch.cat([labels[:, None], tokens.long()], 1)
    local = torch.where((wanted >= first) & (wanted < first + width), wanted - first, -1)
    dtype = torch.float32 if head == "fp32" else torch.bfloat16
    logits: Tensor = _RowProducts.apply(hidden, weight, local, dtype)  # pyright: ignore[reportAssignmentType]
    if group is not None and group.size() > 1:
        logits = _SumOverRanks.apply(logits, group)  # pyright: ignore[reportAssignmentType]
    if head == "bf16":
        logits = logits.to(torch.bfloat16).float()
    logits = logits / temperature
    return logprobs[:, None] + logits[:, 1:] - logits[:, :1]
