"""How Hugging Face tensors become one tensor-parallel shard of a Megatron parameter, and back.

A transform has two pure functions, inverse to each other:
    shard(tensors, dims, rank, size) -> this rank's tensor
    merge(shards, dims)              -> the Hugging Face tensors, in the order of the table's names
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dims:
    """The sizes of a model that joined tensors are cut by."""

    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int


class Transform(Protocol):
    def shard(self, tensors: Sequence[Tensor], dims: Dims, rank: int, size: int) -> Tensor: ...

    def merge(self, shards: Sequence[Tensor], dims: Dims) -> list[Tensor]: ...


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenated; a single part is itself, not a copy."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


class Replicated:
    """The same on every rank: norms and routers."""

    def shard(self, tensors, dims, rank, size):
        return tensors[0]

    def merge(self, shards, dims):
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Cut along one dimension: 0 for column-parallel linears, 1 for row-parallel ones."""

    dim: int

    def shard(self, tensors, dims, rank, size):
        return tensors[0].chunk(size, self.dim)[rank]

    def merge(self, shards, dims):
        return [_join(shards, self.dim)]


class Vocabulary:
    """Rows of the embedding or the LM head, padded with zeros to a multiple of the ranks."""

    def shard(self, tensors, dims, rank, size):
        (table,) = tensors
        padding = dims.padded_vocab_size - dims.vocab_size
        padded = torch.cat([table, table.new_zeros(padding, table.shape[1])]) if padding else table
        return padded.chunk(size)[rank]

    def merge(self, shards, dims):
        return [_join(shards)[: dims.vocab_size]]


class QKV:
    """Query, key and value, interleaved by key-value group: [group: its queries, its key, its value] x groups."""

    def shard(self, tensors, dims, rank, size):
        q, k, v = (t.view(dims.kv_heads, -1, dims.head_dim, *t.shape[1:]) for t in tensors)
        joined = torch.cat([q, k, v], 1)
        return joined.chunk(size)[rank].reshape(-1, *tensors[0].shape[1:])

    def merge(self, shards, dims):
        joined = _join(shards)
        grouped = joined.view(dims.kv_heads, -1, dims.head_dim, *joined.shape[1:])
        parts = grouped.split([dims.heads // dims.kv_heads, 1, 1], 1)
        return [p.reshape(-1, *joined.shape[1:]) for p in parts]


@dataclass(frozen=True)
class Transposed:
    """A matrix that Hugging Face holds as [in, out], or a vector."""

    inner: Transform

    def shard(self, tensors, dims, rank, size):
        return self.inner.shard([t.t() for t in tensors], dims, rank, size)

    def merge(self, shards, dims):
        return [t.t() for t in self.inner.merge(shards, dims)]


class GateUp:
    """The gate and up projections of a gated MLP, each cut into the ranks, joined on each rank."""

    def shard(self, tensors, dims, rank, size):
        return torch.cat([t.chunk(size)[rank] for t in tensors])

    def merge(self, shards, dims):
        halves = [s.chunk(2) for s in shards]
        return [_join([h[i] for h in halves]) for i in range(2)]


class AlternatingGateUp(GateUp):
    """Gate and up in one tensor of Hugging Face, by turns in its first dimension."""

    def shard(self, tensors, dims, rank, size):
        (joined,) = tensors
        return super().shard([joined[0::2], joined[1::2]], dims, rank, size)

    def merge(self, shards, dims):
        gate, up = super().merge(shards, dims)
        return [torch.stack([gate, up], 1).flatten(0, 1)]
