"""How Hugging Face tensors become one tensor-parallel shard of a Megatron parameter, and back.

A transform has two pure functions, inverse to each other:
    shard(tensors, model, rank, size) -> this rank's tensor
    merge(shards, model)              -> the Hugging Face tensors, in the order of the table's names
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of a gated delta net, and their widths. key_heads: of queries and of keys, each for as many value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def sections(self) -> tuple[int, ...]:
        """Rows of queries, keys, values, output gates, betas and decays in the projection of the input."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return keys, keys, values, values, self.value_heads, self.value_heads


class Sizes(Protocol):
    """What joined tensors are cut by, of a description.ModelDescription."""

    @property
    def heads(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def delta_net(self) -> DeltaHeads: ...

    def padded_vocab_size(self, tensor_parallel: int) -> int: ...


class Transform(Protocol):
    def shard(self, tensors: Sequence[Tensor], model: Sizes, rank: int, size: int) -> Tensor: ...

    def merge(self, shards: Sequence[Tensor], model: Sizes) -> list[Tensor]: ...


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenated; a single part is itself, not a copy."""
    import torch  # here: tables of families are read where no tensor is cut

    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


class Replicated:
    """The same on every rank: norms and routers."""

    def shard(self, tensors, model, rank, size):
        return tensors[0]

    def merge(self, shards, model):
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Cut along one dimension: 0 for column-parallel linears, 1 for row-parallel ones."""

    dim: int

    def shard(self, tensors, model, rank, size):
        return tensors[0].chunk(size, self.dim)[rank]

    def merge(self, shards, model):
        return [_join(shards, self.dim)]


class Vocabulary:
    """Rows of the embedding or the LM head, padded with zeros to a multiple of the ranks."""

    def shard(self, tensors, model, rank, size):
        (table,) = tensors
        padding = model.padded_vocab_size(size) - model.vocab_size
        padded = _join([table, table.new_zeros(padding, table.shape[1])]) if padding else table
        return padded.chunk(size)[rank]

    def merge(self, shards, model):
        return [_join(shards)[: model.vocab_size]]


class QKV:
    """Query, key and value, interleaved by key-value group: [group: its queries, its key, its value] x groups."""

    def shard(self, tensors, model, rank, size):
        q, k, v = (t.view(model.kv_heads, -1, model.head_dim, *t.shape[1:]) for t in tensors)
        joined = _join([q, k, v], 1)
        return joined.chunk(size)[rank].reshape(-1, *tensors[0].shape[1:])

    def merge(self, shards, model):
        joined = _join(shards)
        grouped = joined.view(model.kv_heads, -1, model.head_dim, *joined.shape[1:])
        parts = grouped.split([model.heads // model.kv_heads, 1, 1], 1)
        return [p.reshape(-1, *joined.shape[1:]) for p in parts]


class GatedQKV(QKV):
    """The same where each head's query stands before its output gate: [group: its queries, its gates, its key, its
    value] x groups."""

    def shard(self, tensors, model, rank, size):
        q, k, v = tensors
        heads = q.view(model.kv_heads, -1, 2, model.head_dim, *q.shape[1:])
        return super().shard([heads.transpose(1, 2).reshape(q.shape), k, v], model, rank, size)

    def merge(self, shards, model):
        joined = _join(shards)
        grouped = joined.view(model.kv_heads, -1, model.head_dim, *joined.shape[1:])
        q, k, v = grouped.split([2 * model.heads // model.kv_heads, 1, 1], 1)
        heads = q.unflatten(1, (2, -1)).transpose(1, 2)
        return [p.reshape(-1, *joined.shape[1:]) for p in (heads, k, v)]


class DeltaSections:
    """Queries, keys and values of all heads of a gated delta net, one section after the other: its convolution. Each is
    cut into the ranks, and joined on each."""

    def sections(self, model: Sizes) -> tuple[int, ...]:
        return model.delta_net.sections[:3]

    def apart(self, tensors: Sequence[Tensor], model: Sizes) -> list[Tensor]:
        """Hugging Face tensors -> the sections, heads in order."""
        return list(tensors[0].split(list(self.sections(model))))

    def together(self, sections: list[Tensor], model: Sizes) -> list[Tensor]:
        return [_join(sections)]

    def shard(self, tensors, model, rank, size):
        return _join([section.chunk(size)[rank] for section in self.apart(tensors, model)])

    def merge(self, shards, model):
        parts = [shard.split([rows // len(shards) for rows in self.sections(model)]) for shard in shards]
        return self.together([_join(ranks) for ranks in zip(*parts, strict=True)], model)


class DeltaProjection(DeltaSections):
    """All that a gated delta net projects its input to, in two tensors of Hugging Face (Qwen3-Next): by key head its
    query, its key, and the values and output gates of its value heads; by key head their betas and decays."""

    def sections(self, model):
        return model.delta_net.sections

    def apart(self, tensors, model):
        by_head = [t.view(model.delta_net.key_heads, -1, *t.shape[1:]) for t in tensors]
        q, k, v, z, b, a = (rows // model.delta_net.key_heads for rows in self.sections(model))
        parts = (*by_head[0].split([q, k, v, z], 1), *by_head[1].split([b, a], 1))
        return [p.reshape(-1, *p.shape[2:]) for p in parts]

    def together(self, sections, model):
        by_head = [s.view(model.delta_net.key_heads, -1, *s.shape[1:]) for s in sections]
        return [_join(parts, 1).flatten(0, 1) for parts in (by_head[:4], by_head[4:])]


class SplitDeltaProjection(DeltaProjection):
    """The same in four tensors (Qwen3.5): queries, keys and values as in the convolution; gates; betas; decays."""

    def apart(self, tensors, model):
        joined, *others = tensors
        return [*joined.split(list(self.sections(model)[:3])), *others]

    def together(self, sections, model):
        return [_join(sections[:3]), *sections[3:]]


@dataclass(frozen=True)
class Transposed:
    """A matrix that Hugging Face holds as [in, out], or a vector."""

    inner: Transform

    def shard(self, tensors, model, rank, size):
        return self.inner.shard([t.t() for t in tensors], model, rank, size)

    def merge(self, shards, model):
        return [t.t() for t in self.inner.merge(shards, model)]


class GateUp:
    """The gate and up projections of a gated MLP, each cut into the ranks, joined on each rank."""

    def shard(self, tensors, model, rank, size):
        return _join([t.chunk(size)[rank] for t in tensors])

    def merge(self, shards, model):
        halves = [s.chunk(2) for s in shards]
        return [_join([h[i] for h in halves]) for i in range(2)]


class AlternatingGateUp(GateUp):
    """Gate and up in one tensor of Hugging Face, by turns in its first dimension."""

    def shard(self, tensors, model, rank, size):
        (joined,) = tensors
        return super().shard([joined[0::2], joined[1::2]], model, rank, size)

    def merge(self, shards, model):
        gate, up = super().merge(shards, model)
        return [_join([gate.unsqueeze(1), up.unsqueeze(1)], 1).flatten(0, 1)]
