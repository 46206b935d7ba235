"""What is written and read of a dist checkpoint, planned in time that grows with the number of its shards.

Megatron-Core (0.19.2) keeps all layers and experts of a kind in one tensor, [layers, experts, ...], a shard each. torch
(2.14.1) compares all pairs of shards that reach over the same stretch of the longest axis, which is most often one of
the matrix, and so all pairs: when a tensor is described, when its writing is planned, and when its reading is. With 48
layers of 128 experts the gates and ups are 12,288 shards, 75 million pairs, and as many again for each thing that Adam
keeps. Here a shard is compared with those of its own layer and expert alone. What is written is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.mcore import MCoreLoadPlanner, MCoreSavePlanner, ShardedTensor, mcore_to_pyt_state_dict

Resolve = Callable[[Tensor], Tensor]
Chunks = Sequence[ChunkStorageMetadata]
"""Shards of one tensor: their offsets and sizes in it."""
Place = tuple[int, ...]
"""Offsets on some axes."""


def torch_state(shards: dict[str, list[Any]], *, loading: bool = False) -> dict[str, Any]:
    """What torch saves or loads, of Megatron-Core's shards and objects by key.

    loading: shards without data get some, and what is read is written into the data of every shard.
    """
    whole = {
        key: [_whole(it, loading) if isinstance(it, ShardedTensor) else it for it in held]
        for key, held in shards.items()
    }
    return mcore_to_pyt_state_dict(whole, loading)


def _whole(shard: ShardedTensor, loading: bool) -> ShardedTensor:
    """A view of the shard that has the axes of layers and experts itself: torch needs to know no others then."""
    if shard.data is None and loading:
        shard.init_data(torch.device("cpu"), init_fn=torch.zeros if shard.allow_shape_mismatch else torch.empty)
    if not shard.prepend_axis_num:
        return shard
    if not loading:
        shard.data = shard.data.contiguous()  # as it lies, torch would write it
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return replace(shard, data=shard.data.detach().view(shape), local_shape=shape, prepend_axis_num=0)


def unit_axes(chunks: Iterable[ChunkStorageMetadata]) -> tuple[int, ...]:
    """Axes on which all chunks are one element wide. Chunks that lie elsewhere on one have no element in common."""
    sizes = {tuple(chunk.sizes) for chunk in chunks}
    return tuple(axis for axis, lengths in enumerate(zip(*sizes, strict=True)) if set(lengths) == {1})


def by_place(chunks: Chunks, axes: tuple[int, ...]) -> dict[Place, list[int]]:
    """Numbers of the chunks by their offsets on these axes."""
    places: dict[Place, list[int]] = {}
    for number, chunk in enumerate(chunks):
        places.setdefault(tuple(chunk.offsets[axis] for axis in axes), []).append(number)
    return places


class SavePlanner(MCoreSavePlanner):
    """Megatron-Core's, with the values of a tensor asked for when they are written."""

    def __init__(self, resolve: Resolve = lambda tensor: tensor):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        self.resolve = resolve
        self._held: dict[MetadataIndex, Any] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._held = {item.index: super(SavePlanner, self).lookup_object(item.index) for item in plan.items}
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError where shards overlap, or lie outside their tensor."""
        self.global_plan, self.metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        if wrong := list(_misplaced(self.metadata)):
            raise ValueError("; ".join(wrong[:3]))
        return self.global_plan, self.metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        """torch's goes through all shards of a rank for each, but on the first rank."""
        return self._held[index]

    def resolve_data(self, write_item):
        data = super().resolve_data(write_item)
        return self.resolve(data) if isinstance(data, Tensor) else data


def _misplaced(metadata: Metadata) -> Iterator[str]:
    """What is wrong with the shards of each tensor, a sentence each."""
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or not len(stored.size):
            continue
        for chunk in stored.chunks:
            ends = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
            if any(at < 0 or at + n > whole for at, n, whole in ends):
                yield f"{key}: {chunk} lies outside of {list(stored.size)}"
        for numbers in by_place(stored.chunks, unit_axes(stored.chunks)).values():
            for one, other in _overlapping([stored.chunks[number] for number in numbers]):
                yield f"{key}: {one} and {other} overlap"


def _overlapping(chunks: list[ChunkStorageMetadata]) -> Iterator[tuple[ChunkStorageMetadata, ChunkStorageMetadata]]:
    """Pairs that have elements in common, found along the axis that is divided most."""
    if len(chunks) < 2:
        return
    axis = max(range(len(chunks[0].offsets)), key=lambda a: len({chunk.offsets[a] for chunk in chunks}))
    reached: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        reached = [one for one in reached if one.offsets[axis] + one.sizes[axis] > chunk.offsets[axis]]
        for one in reached:
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(one.offsets, one.sizes, chunk.offsets, chunk.sizes, strict=True)
            ):
                yield one, chunk
        reached.append(chunk)


class LoadPlanner(MCoreLoadPlanner):
    """Megatron-Core's, for tensors of many shards too."""

    def __init__(self, shards: Iterable[ShardedTensor]):
        shards = list(shards)
        super().__init__(
            shapes_validation_sharded_tensors=[shard for shard in shards if not shard.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={s.key: s for s in shards if s.allow_shape_mismatch},
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )

    def create_local_plan(self) -> LoadPlan:
        state, self.state_dict = self.state_dict, {}
        chunks = {key: it.__create_chunk_list__() for key, it in state.items() if hasattr(it, "__create_chunk_list__")}
        many = {key for key, held in chunks.items() if len(held) > 1}
        self.state_dict = {key: it for key, it in state.items() if key not in many}
        try:
            plan = super().create_local_plan()  # checks the shapes of all
        finally:
            self.state_dict = state
        stored = self.metadata.state_dict_metadata
        return LoadPlan(plan.items + [item for key in sorted(many) for item in _reads(key, stored[key], chunks[key])])


def _reads(key: str, stored: TensorStorageMetadata, mine: Chunks) -> Iterator[ReadItem]:
    """What is to be read of a stored tensor for these chunks of it."""
    axes = unit_axes([*stored.chunks, *mine])
    there = by_place(stored.chunks, axes)
    for place, numbers in by_place(mine, axes).items():
        saved = [stored.chunks[number] for number in there.get(place, ())]
        part = TensorStorageMetadata(stored.properties, stored.size, saved)
        for item in create_read_items_for_chunk_list(key, part, [mine[number] for number in numbers]):
            wanted = item.dest_index
            assert wanted.index is not None
            yield replace(item, dest_index=MetadataIndex(key, wanted.offset, numbers[wanted.index]))
