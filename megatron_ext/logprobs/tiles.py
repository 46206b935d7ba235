"""A tile of the vocabulary: what forward keeps of it and what backward makes of it, in torch.

x = logits / T of some tokens and some columns; see `logprobs` for the equations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

FLOOR = -1e30  # the score of a token outside the kept set: finite, so that its probability 0 times it is 0
CACHED = 2**18  # scores that stay in a core's cache between the passes over them


class RowStats(NamedTuple):
    """What forward keeps of the columns seen so far, each [tokens] float32.

    peak:     the largest x.
    total:    sum of exp(x - peak).
    weighted: sum of exp(x - peak) (x - peak).
    target:   x of the label, 0 where the label is in other columns.
    """

    peak: Tensor
    total: Tensor
    weighted: Tensor
    target: Tensor

    @classmethod
    def empty(cls, tokens: int, device: torch.device) -> RowStats:
        """Of no column yet."""
        return cls(torch.full((tokens,), FLOOR, device=device), *torch.zeros(3, tokens, device=device))

    def rows(self, rows: slice) -> RowStats:
        """A view of some tokens."""
        return RowStats(*(x[rows] for x in self))

    def under(self, peak: Tensor) -> RowStats:
        """The same relative to a peak that is at least as large."""
        gap = self.peak - peak
        scale = gap.exp()
        return RowStats(peak, self.total * scale, (self.weighted + gap * self.total) * scale, self.target)

    def add(self, other: RowStats) -> None:
        """Join other columns of the same tokens, in place."""
        peak = torch.maximum(self.peak, other.peak)
        for mine, a, b in zip(self[1:], self.under(peak)[1:], other.under(peak)[1:], strict=True):
            mine.copy_(a + b)
        self.peak.copy_(peak)


class RowGradients(NamedTuple):
    """What backward knows of each token, [tokens] float32: log sum exp x, the entropy H, and the gradients of the
    label's log-prob and of H (None: the loss does not use H)."""

    lse: Tensor
    entropy: Tensor
    of_logprob: Tensor
    of_entropy: Tensor | None

    def rows(self, rows: slice) -> RowGradients:
        """A view of some tokens."""
        return RowGradients(*(None if x is None else x[rows] for x in self))


@dataclass(frozen=True)
class TorchTiles:
    """Tiles from hidden states [tokens, h] and weights [columns, h] of one dtype.

    temperature: T.
    rounds:      the matmul's output is bf16 before anything else happens to it.
    """

    STATS_OF_ANY_WIDTH: ClassVar[bool] = False  # whether `stats` never holds the scores, so that one call may walk all
    HAS_SCORES: ClassVar[bool] = True  # whether `stats` can leave them to `gradient`

    temperature: float
    rounds: bool

    def stats(
        self, x: Tensor, w: Tensor, labels: Tensor, kept: Tensor | None, left: list[Tensor] | None = None
    ) -> RowStats:
        """labels: [tokens] int64, relative to these columns. kept: [tokens, columns / 32] int32 bits, or None. left:
        the scores are added to it, for `gradient`."""
        whole, parts = self._scores(x, w), []
        if left is not None:
            left.append(whole)
        for rows, scores in _cached(whole):
            _mask(scores, kept, rows)
            inside, local = _inside(labels[rows], w.shape[0])
            target = torch.where(inside, scores.gather(1, local[:, None])[:, 0], 0.0)
            peak = scores.amax(1)
            below = torch.sub(scores, peak[:, None], out=scores if left is None else torch.empty_like(scores))
            weights = below.exp()
            total = weights.sum(1)
            parts.append((peak, total, weights.mul_(below).sum(1), target))
        return RowStats(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def gradient(
        self,
        x: Tensor,
        w: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        given: RowGradients,
        left: Tensor | None = None,
    ) -> Tensor:
        """The gradient of the logits (before T), [tokens, columns] in the dtype of x and w. left: the scores that
        `stats` left, which are not changed; None: they are made again."""
        gradient = self._scores(x, w) if left is None else torch.empty_like(left)
        for rows, scores in _cached(gradient):
            if left is None:
                _mask(scores, kept, rows)
            lse, entropy, of_logprob, of_entropy = given.rows(rows)
            scale = of_logprob[:, None] / self.temperature
            log_p = torch.sub(scores if left is None else left[rows], lse[:, None], out=scores)
            if of_entropy is not None:
                scale_entropy = of_entropy[:, None] / self.temperature
                scale = torch.addcmul(scale, log_p + entropy[:, None], scale_entropy)
            scores.exp_().mul_(scale).neg_()
            inside, local = _inside(labels[rows], w.shape[0])
            scores.scatter_add_(1, local[:, None], torch.where(inside, of_logprob / self.temperature, 0.0)[:, None])
        return gradient.to(x.dtype)

    def _scores(self, x: Tensor, w: Tensor) -> Tensor:
        """x of a tile, [tokens, columns] float32, a new tensor."""
        logits = torch.mm(x, w.t()).float() if self.rounds else product(x, w.t())
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, accumulated in float32. Products of two bf16 are exact there."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, all in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        into += product(a, b)
    else:
        into.addmm_(a.float(), b.float())


def keep_bits(kept: Tensor, first: int, columns: int) -> Tensor:
    """[tokens, K] distinct ids, -1 behind -> [tokens, columns / 32] int32, a bit for each of the columns from id
    `first`. A row of only -1 keeps all."""
    local = kept.long() - first
    here = (kept >= 0) & (local >= 0) & (local < columns)
    local = torch.where(here, local, 0)
    words = torch.zeros(len(kept), max(1, -(-columns // 32)), dtype=torch.int32, device=kept.device)
    words.scatter_add_(1, local // 32, torch.where(here, 1 << (local % 32), 0).to(torch.int32))  # adding is or-ing
    return words.masked_fill_((kept < 0).all(1, keepdim=True), -1)


def _mask(scores: Tensor, kept: Tensor | None, rows: slice) -> None:
    """Tokens outside the kept set fall to FLOOR, in place."""
    if kept is not None:
        bits = (kept[rows, :, None] >> torch.arange(32, dtype=torch.int32, device=kept.device)) & 1
        scores.masked_fill_(bits.flatten(1)[:, : scores.shape[1]] == 0, FLOOR)


def _inside(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which labels are in these columns, and an index for each that is safe to read."""
    return (labels >= 0) & (labels < columns), labels.clamp(0, columns - 1)


def _cached(scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a tile; on a CPU so few at a time that several passes over them read memory once."""
    step = len(scores) if scores.is_cuda else max(1, CACHED // scores.shape[1])
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        yield rows, scores[rows]
