"""Log-probability and entropy of a token from hidden states and the LM head, without the logits.

    x_v = h . w_v / T,   log p(y) = x_y - log sum_v exp x_v,   H = log sum_v exp x_v - sum_v p_v x_v
    dx_v = g (1[v = y] - p_v) - g_H p_v (log p_v + H)          for gradients g of log p(y) and g_H of H

The vocabulary is walked in tiles: forward keeps four numbers a token (the largest logit, the sum of exponentials under
it, the same weighted, the label's logit), backward computes each tile's logits again. Only one tile exists at a time,
so memory does not grow with the vocabulary. The price is a fourth matmul beside the three of a head that keeps its
logits. Where all logits of a call are no more than `sizes.KEPT`, they are kept, and backward is spared that matmul; the
numbers are the same, bit for bit. A tile is torch here, or a Triton kernel (`triton_kernels`) on a GPU, which never has
its logits in memory. A vocabulary split among tensor-parallel ranks costs two all-reduces of a few numbers a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import Head
from megatron_ext.logprobs.sizes import MAX_ROWS, TILE, kept_scores
from megatron_ext.logprobs.tiles import RowGradients, RowStats, TorchTiles, add_product, keep_bits


@dataclass(frozen=True)
class _Head:
    """What a call fixes: this rank's columns of real tokens, the dtype of the matmul's inputs, who computes a tile, and
    whether forward leaves the logits to backward."""

    columns: int
    dtype: torch.dtype
    math: TorchTiles
    group: dist.ProcessGroup | None
    leaves: bool = False

    def tiles(self, weight: Tensor, tokens: int, *, stats: bool) -> Iterator[tuple[slice, Tensor, list[slice]]]:
        """Columns, their weights in the dtype of the matmul, and the rows to walk."""
        rows = max(1, min(MAX_ROWS, tokens))
        step = max(256, TILE[weight.device.type] // rows // 256 * 256)
        if stats and self.math.STATS_OF_ANY_WIDTH and weight.dtype == self.dtype:
            step = max(256, self.columns)
        row_slices = [slice(r, min(r + rows, tokens)) for r in range(0, tokens, rows)]
        for start in range(0, self.columns, step):
            columns = slice(start, min(start + step, self.columns))
            yield columns, weight[columns].to(self.dtype), row_slices

    def merge(self, stats: RowStats) -> RowStats:
        """Over the ranks that hold the other columns."""
        if self.group is None or self.group.size() == 1:
            return stats
        peak = stats.peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, self.group)
        sums = torch.stack(stats.under(peak)[1:])
        dist.all_reduce(sums, group=self.group)
        return RowStats(peak, *sums)


def _words(kept: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    return None if kept is None else kept[rows, columns.start // 32 : -(-columns.stop // 32)]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor | None, head: _Head):
        x = hidden.to(head.dtype)
        stats = RowStats.empty(len(x), x.device)
        left: list[Tensor] | None = [] if head.leaves else None
        for columns, w, row_slices in head.tiles(weight, len(x), stats=True):
            for rows in row_slices:
                local = labels[rows] - columns.start
                stats.rows(rows).add(head.math.stats(x[rows], w, local, _words(kept, rows, columns), left))
        peak, total, weighted, target = head.merge(stats)
        log_total = total.log()
        logprobs, entropy = (target - peak) - log_total, log_total - weighted / total
        ctx.save_for_backward(hidden, weight, labels, kept, peak + log_total, entropy, *(left or ()))
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_logprob, of_entropy):
        hidden, weight, labels, kept, lse, entropy, *left = ctx.saved_tensors
        head, (needs_hidden, needs_weight, *_) = ctx.head, ctx.needs_input_grad
        if of_logprob is None and of_entropy is None:
            return None, None, None, None, None
        given = RowGradients(lse, entropy, torch.zeros_like(lse) if of_logprob is None else of_logprob, of_entropy)
        x = hidden.to(head.dtype)
        of_hidden = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs_hidden else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        if of_weight is not None:
            of_weight[head.columns :] = 0
        scores = iter(left)
        for columns, w, row_slices in head.tiles(weight, len(x), stats=False):
            in_place = weight.dtype == head.dtype and len(row_slices) == 1
            of_columns = torch.zeros(0 if in_place or not needs_weight else w.shape, device=w.device)
            for rows in row_slices:
                local, words = labels[rows] - columns.start, _words(kept, rows, columns)
                of_logits = head.math.gradient(x[rows], w, local, words, given.rows(rows), next(scores, None))
                if of_hidden is not None:
                    add_product(of_hidden[rows], of_logits, w)
                if of_weight is not None and in_place:
                    torch.mm(of_logits.t(), x, out=of_weight[columns])
                elif of_weight is not None:
                    add_product(of_columns, of_logits.t(), x[rows])
            if of_weight is not None and not in_place:
                of_weight[columns] = of_columns  # rounded once, after all rows
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight, None, None, None


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [tokens, h], weight [vocabulary, h] and labels [tokens], not {[*hidden.shape]}, "
            f"{[*weight.shape]} and {[*labels.shape]}"
        )


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    head: Head = "fp32",
    kept: Tensor | None = None,
    kernel: Literal["torch", "triton"] | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight^T / T)[label] and the entropy of that softmax.

    hidden:      [tokens, h] float32 or bfloat16, the same on all ranks of `group`.
    weight:      [padded vocabulary / tp, h] float32 or bfloat16; this rank's rows.
    labels:      [tokens] int64, in the whole vocabulary.
    vocab_size:  real tokens; rows of `weight` beyond it are padding, have no probability and get no gradient.
    group:       the tensor-parallel group; None: `weight` is the whole vocabulary.
    temperature: T > 0.
    head:        what the logits are made of:
                 "bf16": bf16 inputs, and the logits rounded to bf16, as engines do by default;
                 "fp32_accumulate": bf16 inputs, products accumulated in float32 and not rounded;
                 "fp32": inputs in float32. Of bf16 weights and hidden states the last two differ in order of summation
                 alone. In backward the logits' gradient takes the dtype of the inputs; its sums are float32 in all.
    kept:        [tokens, K] integers, the distinct token ids that top-p or top-k left to the sampler, -1 behind; both
                 results are then over these. A row of only -1 means the whole vocabulary. None: so do all.
    kernel:      who computes a tile. None: Triton on Hopper GPUs and later under the two bf16 heads (its float32 is
                 slower than cuBLAS's), else torch.

    Returns two [tokens] float32, equal on all ranks, both with gradient to `hidden` and `weight`; what the loss does
    not use costs nothing in backward. The gradient of `hidden` is this rank's part and NOT reduced over `group`: the
    parts sum to the whole. Megatron's gather_from_sequence_parallel_region (under sequence parallelism) and
    copy_to_tensor_model_parallel_region (without) before the call sum them in backward.

    Raises ValueError for T <= 0, ids outside the vocabulary, a kept set that names a token twice or does not hold the
    label (its log-prob would be -inf and every ratio after it nan: the sampler's mask is of another token), TF32 under
    the fp32 head, shapes that do not match.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}: greedy sampling has no log-prob")
    _check_shapes(hidden, weight, labels)
    if head == "fp32":
        _refuse_tf32()
    world, rank = (1, 0) if group is None else (group.size(), group.rank())
    width = weight.shape[0]
    if width * world < vocab_size:
        raise ValueError(f"{world} ranks with {width} rows of weight each do not hold a vocabulary of {vocab_size}")
    first = rank * width
    columns = max(0, min(width, vocab_size - first))
    _check_ids(labels, kept, vocab_size)
    dtype, rounds = (torch.float32 if head == "fp32" else torch.bfloat16), head == "bf16"
    math = TorchTiles(temperature, rounds)
    if (kernel or _default_kernel(hidden, head)) == "triton":
        from megatron_ext.logprobs.triton_kernels import TritonTiles

        math = TritonTiles(temperature, rounds, columns)
    bits = None if kept is None else keep_bits(kept, first, columns)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    leaves = learns and math.HAS_SCORES and kept_scores(len(hidden), columns, hidden.device.type) > 0
    return _LinearLogprobs.apply(hidden, weight, labels - first, bits, _Head(columns, dtype, math, group, leaves))


def _default_kernel(hidden: Tensor, head: Head) -> Literal["torch", "triton"]:
    hopper = hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= (9, 0)
    return "triton" if hopper and head != "fp32" else "torch"


def _check_ids(labels: Tensor, kept: Tensor | None, vocab_size: int) -> None:
    """One transfer from the device tells whether anything is wrong; only then it is looked for."""
    bad = (labels < 0) | (labels >= vocab_size)
    if kept is not None:
        bounded = (kept >= vocab_size).any(1)
        ordered = kept.sort(1).values
        repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
        missing = (kept >= 0).any(1) & ~(kept == labels[:, None]).any(1)
        bad = torch.stack([bad, bounded, repeated, missing])
    if not bool(bad.any()):
        return
    why, token = (int(i) for i in bad.reshape(-1, len(labels)).nonzero()[0])
    label = int(labels[token])
    raise ValueError(
        (
            f"label {label} of token {token} is not in the vocabulary of {vocab_size}",
            f"the kept set of token {token} has an id beyond the vocabulary of {vocab_size}",
            f"the kept set of token {token} names an id twice",
            f"label {label} of token {token} is not in its kept set: the sampling mask belongs to another token",
        )[why]
    )


def _refuse_tf32() -> None:
    backends = {"torch.backends.cuda.matmul": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}
    for name, backend in backends.items():
        if backend.fp32_precision not in ("ieee", "none"):
            raise ValueError(
                f"the fp32 head needs full float32 matmuls, but {name} uses {backend.fp32_precision}; "
                'call torch.set_float32_matmul_precision("highest"), or choose another head'
            )
