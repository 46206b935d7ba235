"""Log-probability and entropy of a token over a vocabulary that is split among tensor-parallel ranks, in fp32.

The logits are read in chunks of rows, so that no fp32 copy of all of them exists; backward reads them again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

ROWS = 4096  # rows of logits in fp32 at once


def _local_columns(logits: torch.Tensor, vocab_size: int, rank: int) -> int:
    """How many of this rank's columns are real tokens; the rest pad the vocabulary to a multiple of the ranks."""
    return max(0, min(logits.shape[-1], vocab_size - rank * logits.shape[-1]))


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, vocab_size, group):
        rank, width = group.rank(), logits.shape[-1]
        columns, first = _local_columns(logits, vocab_size, rank), rank * width
        logprobs = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        entropy, lse = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in torch.arange(len(labels), device=logits.device).split(ROWS):
            x = logits[rows, :columns].float() / temperature
            peak = x.max(-1).values if columns else x.new_full((len(x),), -torch.inf)
            if group.size() > 1:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            weights = (x - peak[:, None]).exp()
            local = labels[rows] - first
            here = (local >= 0) & (local < columns)
            picked = (
                x.gather(1, local.clamp(0, max(columns - 1, 0))[:, None])[:, 0] if columns else torch.zeros_like(peak)
            )
            sums = torch.stack([weights.sum(-1), (weights * x).sum(-1), torch.where(here, picked, 0.0)])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            lse[rows] = peak + sums[0].log()
            logprobs[rows] = sums[2] - lse[rows]
            entropy[rows] = lse[rows] - sums[1] / sums[0]
        ctx.save_for_backward(logits, labels, lse)
        ctx.temperature, ctx.columns, ctx.first = temperature, columns, first
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads):
        logits, labels, lse = ctx.saved_tensors
        grad, columns = torch.zeros_like(logits), ctx.columns
        for rows in torch.arange(len(labels), device=logits.device).split(ROWS):
            scale = grads[0][rows] / ctx.temperature
            probs = (logits[rows, :columns].float() / ctx.temperature - lse[rows, None]).exp()
            part = probs * -scale[:, None]
            local = labels[rows] - ctx.first
            here = (local >= 0) & (local < columns)
            part[here.nonzero()[:, 0], local[here]] += scale[here]
            grad[rows, :columns] = part.to(grad.dtype)
        return grad, None, None, None, None


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / T)[label] and the entropy of softmax(logits / T).

    logits:     [tokens, padded vocabulary / tp], any float dtype; this rank's columns.
    labels:     [tokens] int64, in the whole vocabulary.
    vocab_size: real tokens; columns beyond it are padding and have no probability.
    group:      the tensor-parallel group.
    Returns two [tokens] float32, equal on all ranks of the group. The gradient flows to `logits` from the log-prob
    alone; the entropy is for observation.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}: greedy sampling has no log-prob")
    return _VocabParallelLogProb.apply(logits, labels, temperature, vocab_size, group)
