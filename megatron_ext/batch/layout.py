"""Where every token lies: the one place that packs, pads and slices tokens, scalars and routes.

A sample of P prompt and N response tokens enters the model as its first P + N - 1 tokens; the label of each is the
token that follows, so a route row exists for every input token and the log-probs of the response are the last N.

    samples -> micro-batches (balanced, same number on every data-parallel rank)
            -> one row of all sequences ("packed": each padded for its zigzag chunks, the last for the ranks),
               or one row a sequence ("padded": all to one length)
            -> this context-parallel rank's zigzag slice -> this sequence-parallel rank's slice
            -> and back: log-probs of the slice -> [samples, tokens] matrices of responses

Both arrangements are laid out alike, one sequence after another; they differ in how much padding stands between the
sequences, and in the order in which a router sees the tokens (position by position where there are several rows).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_ext.zigzag import zigzag_positions


@dataclass(frozen=True)
class Sample:
    """One sequence as the trainer sees it.

    tokens:        [P + N] int32.
    prompt_length: P, at least 1.
    row:           what the loss is to know of this sample; the trainer only carries it there (`LossBatch.rows`).
    routes:        [P + N - 1, layers, topk] unsigned or signed integers, or what numpy makes into that; or None.
    kept:          [N, K] token ids that each response token was sampled from, -1 behind them; its log-prob and entropy
                   are over these. None: over the vocabulary.
    named:         [N, k] token ids whose log-probs the loss reads beside each token's own. None: of no others.
    trained:       [N] bool: the response tokens that the loss counts; the others are read, and no more. None: all.
    """

    tokens: np.ndarray
    prompt_length: int
    row: Any = None
    routes: Any = None
    kept: np.ndarray | None = None
    trained: np.ndarray | None = None
    named: np.ndarray | None = None

    def __post_init__(self):
        if not 1 <= self.prompt_length < len(self.tokens):
            raise ValueError(
                f"a sample needs a prompt and a response: {len(self.tokens)} tokens, {self.prompt_length} of prompt"
            )
        if self.routes is not None and len(self.routes) != self.input_length:
            raise ValueError(f"{len(self.routes)} route rows for {self.input_length} input tokens")
        for name in ("kept", "trained", "named"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != self.response_length:
                raise ValueError(f"{name} has {len(rows)} rows for a response of {self.response_length} tokens")

    @property
    def input_length(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.tokens) - 1

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length


def plan_micro_batches(
    lengths: Sequence[int], *, token_budget: int, dp_size: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Deal samples into micro-batches of about equal tokens.

    lengths:     input tokens of each sample.
    token_budget: most tokens in one micro-batch; a longer sample has a micro-batch of its own.
    dp_size:     data-parallel ranks; each gets the same number of micro-batches (some may be empty: the ranks meet in
                 collectives, so none may run fewer).
    multiple_of: the number of micro-batches a rank runs is a multiple of this (interleaved pipelines demand it).

    Returns [dp_size][micro-batches][samples]: indices into `lengths`, each exactly once. The same everywhere for the
    same arguments, so that ranks need not agree on it by message.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be positive, not {token_budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, math.ceil(sum(lengths) / token_budget / dp_size))
    while True:
        per_rank = math.ceil(per_rank / multiple_of) * multiple_of
        bins: list[list[int]] = [[] for _ in range(per_rank * dp_size)]
        loads = [(0, b) for b in range(len(bins))]  # a heap
        for i in order:
            load, b = loads[0]
            bins[b].append(i)
            heapq.heapreplace(loads, (load + lengths[i], b))
        if all(load <= token_budget or len(bins[b]) <= 1 for load, b in loads):
            break
        per_rank += 1
    bins = [sorted(b) for b in bins]
    return [bins[rank::dp_size] for rank in range(dp_size)]


@dataclass(frozen=True)
class TokenLayout:
    """The sequences of one micro-batch, one after another, and this rank's part of them.

    lengths: input tokens of each sample. At least one sample.
    sequence_parallel_size: 1 where sequence parallelism is off, else the tensor-parallel size.
    packed:  one row of all sequences; False: a row each, padded to one length.
    align:   tokens of a row on one rank are a multiple of this (FP8 matrix products want 16 or 32).
    """

    lengths: tuple[int, ...]
    cp_size: int = 1
    cp_rank: int = 0
    sequence_parallel_size: int = 1
    sequence_parallel_rank: int = 0
    packed: bool = True
    align: int = 1

    @cached_property
    def padded_lengths(self) -> tuple[int, ...]:
        """Each sequence padded to whole zigzag chunks, and each row so that it divides among the ranks: the last
        sequence of a packed row, or every sequence to the longest."""
        unit = 2 * self.cp_size if self.cp_size > 1 else 1
        whole = math.lcm(unit, self.cp_size * self.sequence_parallel_size * self.align)
        if not self.packed:
            return (math.ceil(max(self.lengths) / whole) * whole,) * len(self.lengths)
        padded = [math.ceil(n / unit) * unit for n in self.lengths]
        padded[-1] += -sum(padded) % whole
        return tuple(padded)

    @property
    def rows(self) -> int:
        """Rows of the batch that the model reads: 1, or one a sequence."""
        return 1 if self.packed else len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence begins."""
        return tuple(int(s) for s in np.cumsum((0, *self.padded_lengths))[:-1])

    @property
    def total(self) -> int:
        """Tokens of all rows, padding included."""
        return sum(self.padded_lengths)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """[sequences + 1] int32, cumulative padded lengths over all context-parallel ranks."""
        return torch.tensor((*self.starts, self.total), dtype=torch.int32)

    @cached_property
    def is_token(self) -> torch.Tensor:
        """[total] bool: a real token, not padding."""
        out = torch.zeros(self.total, dtype=torch.bool)
        for start, n in zip(self.starts, self.lengths, strict=True):
            out[start : start + n] = True
        return out

    def _local_of(self, cp_rank: int) -> torch.Tensor:
        positions = [
            start + zigzag_positions(n, self.cp_size, cp_rank)
            for start, n in zip(self.starts, self.padded_lengths, strict=True)
        ]
        return torch.from_numpy(np.concatenate(positions))

    @cached_property
    def local(self) -> torch.Tensor:
        """[total / cp] int64: which places this context-parallel rank holds, in its order."""
        return self._local_of(self.cp_rank)

    def _routed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens of whole rows, ...] -> the order in which a router sees them: by position, then by row."""
        return tokens.view(self.rows, -1, *tokens.shape[1:]).transpose(0, 1).flatten(0, 1)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[total] int64: position within its own sequence."""
        return torch.from_numpy(np.concatenate([np.arange(n) for n in self.padded_lengths]))

    def pack(self, rows: Sequence[np.ndarray], fill: int | float = 0) -> torch.Tensor:
        """One array a sample, [length, ...], into [total, ...], padding filled."""
        first = rows[0]
        out = np.full((self.total, *first.shape[1:]), fill, first.dtype)
        for start, n, row in zip(self.starts, self.lengths, rows, strict=True):
            if len(row) != n:
                raise ValueError(f"a row of {len(row)} for a sequence of {n} tokens")
            out[start : start + n] = row
        return torch.from_numpy(out)

    def slice_context(self, packed: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> this context-parallel rank's [total / cp, ...]."""
        return packed[self.local]

    def slice_sequence(self, packed: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> what this rank's routers see, in their order, [total / cp / sp, ...]."""
        return self._routed(self.slice_context(packed)).chunk(self.sequence_parallel_size)[self.sequence_parallel_rank]

    def merge_sequence(self, parts: torch.Tensor) -> torch.Tensor:
        """What all ranks' routers see, [cp, sp, total / cp / sp, ...] in rank order -> [total, ...]."""
        whole = torch.cat([self._routed(self._local_of(r)) for r in range(self.cp_size)])
        return parts.flatten(0, 2)[torch.argsort(whole).to(parts.device)]

    def merge_context(self, parts: torch.Tensor) -> torch.Tensor:
        """[cp, total / cp, ...] in rank order -> [total, ...]."""
        if self.cp_size == 1:
            return parts[0]
        order = torch.cat([self._local_of(r) for r in range(self.cp_size)])
        return parts.flatten(0, 1)[torch.argsort(order).to(parts.device)]

    def responses(self, packed: torch.Tensor, response_lengths: Sequence[int]) -> torch.Tensor:
        """[total, ...] per-input-token values -> [samples, longest response, ...], the last N inputs of each sequence,
        right-padded with zeros."""
        index = np.zeros((len(self.lengths), max(response_lengths)), np.int64)
        ends = [start + n for start, n in zip(self.starts, self.lengths, strict=True)]
        for row, end, response in zip(index, ends, response_lengths, strict=True):
            row[:response] = np.arange(end - response, end)
        mask = response_mask(response_lengths).to(packed.device)
        mask = mask.view(*mask.shape, *[1] * (packed.ndim - 1))
        return packed[torch.from_numpy(index).to(packed.device)].masked_fill(~mask, 0.0)


def response_mask(response_lengths: Sequence[int]) -> torch.Tensor:
    """[samples, longest response] bool."""
    return torch.arange(max(response_lengths)) < torch.tensor(response_lengths)[:, None]


def trained_mask(samples: Sequence[Sample]) -> torch.Tensor:
    """[samples, longest response] bool: the tokens that the loss counts."""
    mask = response_mask([s.response_length for s in samples])
    for row, sample in zip(mask, samples, strict=True):
        if sample.trained is not None:
            row[: sample.response_length] = torch.from_numpy(sample.trained)
    return mask
