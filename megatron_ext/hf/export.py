"""All ranks' shards into a stream of Hugging Face tensors, in buckets of bounded size.

One pipeline stage after another: its ranks gather a bucket of flattened shards, over tensor parallelism or, of
experts, over expert-tensor and expert parallelism, in one collective. Where the stream is for rank 0 only, one replica
gathers to the first rank of the stage, which sends the bucket to rank 0, and no other rank receives any of it.
Otherwise the bucket goes to every rank. Each receiver cuts it into Hugging Face tensors. So it sees the whole model
without ever holding more of it than a bucket.

Or several ranks have a share of the stream each (`share`, `senders/assignment.py`), all at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.hf.bucket import Bucket, cut, together
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.packed import PackedExperts
from megatron_ext.hf.params import local_parameters
from megatron_ext.hf.senders.assignment import Place, Unit, assign, choose_senders, holds_its_own
from megatron_ext.hf.tables import Match
from megatron_ext.mcore import GPTModel, parallel_state
from megatron_ext.progress import WEIGHTS


@dataclass(frozen=True)
class _Item:
    """One parameter of a pipeline stage, as the other stages know it."""

    match: Match
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Piece:
    """What one sender gathers at once. items: numbers within the stage. own: of experts, that only its own rank's."""

    stage: int
    expert: bool
    items: tuple[int, ...]
    own: bool


class HFExporter:
    """Streams the model of all ranks. Every rank must walk the stream to its end."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        model: ModelDescription,
        *,
        value_head: bool = False,
        bucket_bytes: int = 1 << 28,
        values: Callable[[Tensor], Tensor] = Tensor.detach,
    ):
        """value_head: the chunks end in a value head, which has no Hugging Face name and is left out.

        bucket_bytes: most bytes of one bucket's whole tensors; a larger tensor has a bucket of its own, and so many
        bytes are held beside it where it packs experts.
        values: of a parameter, what is streamed in its place."""
        self.model, self.bucket_bytes = model, bucket_bytes
        self.parameters = local_parameters(chunks, model, value_head=value_head)
        self.values = values
        self.device = self.parameters[0][1].device
        mine = [_Item(match, tuple(p.shape), p.dtype) for _, p, match in self.parameters]
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.stages: list[Any] = [None] * self.pp_group.size()
        dist.all_gather_object(self.stages, mine, group=self.pp_group)
        heads = [dist.get_process_group_ranks(self.pp_group)]
        dist.broadcast_object_list(heads, src=0)
        self.heads = heads[0]  # of every stage, the rank that gathers for ranks of other stages
        self.places: list[Any] = [None] * dist.get_world_size()
        here = Place(dist.get_rank(), self.pp_group.rank(), int(parallel_state.get_expert_model_parallel_rank() or 0))
        dist.all_gather_object(self.places, here)
        self.position = 0  # buckets that this rank has passed in the stream it walks

    def __iter__(self) -> Iterator[Bucket]:
        return self.stream()

    @torch.no_grad()
    def stream(self, *, everywhere: bool = True) -> Iterator[Bucket]:
        """Buckets of (name, tensor on the training device, in the dtype it has there), each name exactly once.

        everywhere: to every rank; else to rank 0, and the others' streams are empty.
        With tied embeddings there is no LM head. A bucket has one dtype. Tensors that the rollout engine's loader joins
        (Family.joined) are in one bucket: it does so within a request, and drops in silence what has no partner there.
        """
        self.position = 0
        WEIGHTS.begin(sum(self._bytes(item) for items in self.stages for item in items if self._sent_at_all(item)))
        packed = PackedExperts(self.model.num_experts)
        gather = self._gather if everywhere else self._gather_to_first
        for stage, items in enumerate(self.stages):
            own = [p for _, p, _ in self.parameters] if stage == self.pp_group.rank() else [None] * len(items)
            for expert in (False, True):
                pairs = [(i, p) for i, p in zip(items, own, strict=True) if self._sent(i, expert)]
                for bucket in self._gathers(pairs, expert):
                    flat = gather(bucket, expert, stage)
                    if self.device.type == "cuda":
                        # NCCL's calls return at once: a rank that need not wait would queue copies of all its shards
                        torch.cuda.current_stream().synchronize()
                    if flat is not None:
                        merged = self._merge([item for item, _ in bucket], flat, expert)
                        whole = [each for match, tensors in merged for each in packed.add(match, tensors)]
                        yield from self._pieces(whole)
                    self.position += 1
                    WEIGHTS.add(sum(self._bytes(item) for item, _ in bucket))

    def senders(self, limit: int) -> list[int]:
        """The ranks that `share` the stream, rank 0 first; no more than `limit`."""
        return choose_senders(self.places, limit)

    @torch.no_grad()
    def share(self, senders: Sequence[int]) -> Iterator[list[Bucket]]:
        """What this rank is to send, of a stream whose tensors come once each, from one of the senders each.

        senders: as `senders` says, on every rank. Every rank must walk it to its end, and gets as many lists of buckets
        as every other: a rank may send a list when it has it, for whatever the others need of it for theirs is done.
        """
        self.position = 0
        rank, packed = dist.get_rank(), PackedExperts(self.model.num_experts)
        pieces = self._shares(senders)
        for number in range(max(map(len, pieces.values()))):
            whole: Bucket = []
            for sender in senders:
                if number >= len(pieces[sender]):
                    continue
                piece = pieces[sender][number]
                flat = self._gather_piece(sender, piece)
                if self.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
                if flat is not None:
                    items = [self.stages[piece.stage][n] for n in piece.items]
                    merged = self._merge(items, flat, piece.expert, self.places[rank].expert if piece.own else None)
                    whole = [each for match, tensors in merged for each in packed.add(match, tensors)]
            yield list(self._pieces(whole))
            self.position += 1

    def _gather_piece(self, sender: int, piece: _Piece) -> Tensor | None:
        """[elements of all its shards] on the sender, None elsewhere."""
        here = piece.stage == self.pp_group.rank()
        bucket = [(self.stages[piece.stage][n], self.parameters[n][1] if here else None) for n in piece.items]
        group = _shard_group(piece.expert)
        ways = self._ways(piece.expert)
        if piece.own:
            group = parallel_state.get_expert_tensor_parallel_group()
            ways //= parallel_state.get_expert_model_parallel_world_size()
            assert isinstance(group, dist.ProcessGroup)
        return self._gather_to(sender, bucket, group, piece.stage, ways)

    def _shares(self, senders: Sequence[int]) -> dict[int, list[_Piece]]:
        """sender -> what it gathers, one piece after another; the same on every rank."""
        own = {
            stage: holds_its_own(stage, self.places, senders) and not any(i.match.row.packed for i in items)
            for stage, items in enumerate(self.stages)
        }
        units = [unit for stage in own for expert in (False, True) for unit in self._units(stage, expert, own[stage])]
        out: dict[int, list[_Piece]] = {}
        for sender, mine in assign(units, self.places, senders).items():
            out[sender] = []
            for stage, items in enumerate(self.stages):
                for expert in (False, True):
                    alone = expert and own[stage]
                    numbers = [
                        n for u in mine if u.stage == stage for n in u.items if items[n].match.row.expert == expert
                    ]
                    out[sender] += [
                        _Piece(stage, expert, tuple(bucket), alone)
                        for bucket in self._cut(stage, numbers, expert, alone)
                    ]
        return out

    def _units(self, stage: int, expert: bool, own: bool) -> Iterator[Unit]:
        """What of a stage's parameters stays together: tensors that are joined, experts that are packed."""
        items = self.stages[stage]
        sent = [n for n, item in enumerate(items) if self._sent(item, expert)]

        def set_of(n: int) -> Hashable:
            match = items[n].match
            return (match.row.megatron, match.layer) if match.row.packed else self._joined(match.hf_names)

        ranks = parallel_state.get_expert_model_parallel_world_size() if expert and own else 1
        for unit in together(sent, set_of):
            nbytes = (
                sum(math.prod(items[n].shape) * items[n].dtype.itemsize for n in unit) * self._ways(expert) // ranks
            )
            for rank in range(ranks):
                yield Unit(stage, tuple(unit), nbytes, rank if expert and own else None)

    def _cut(self, stage: int, numbers: list[int], expert: bool, own: bool) -> Iterator[list[int]]:
        """Parameters of a stage in pieces that are of bounded size once they are gathered."""
        items = self.stages[stage]
        ways = self._ways(expert)
        if own:
            ways //= parallel_state.get_expert_model_parallel_world_size()
        return cut(
            numbers,
            lambda n: (math.prod(items[n].shape) * ways * items[n].dtype.itemsize, items[n].dtype),
            self.bucket_bytes,
            lambda n: self._joined(items[n].match.hf_names),
        )

    def outputs(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor without storage) of everything that `stream` gives, in its order; no rank need meet another."""
        packed = PackedExperts(self.model.num_experts)
        for items in self.stages:
            for expert in (False, True):
                sent = [item for item in items if self._sent(item, expert)]
                for item in (i for unit in together(sent, lambda i: self._joined(i.match.hf_names)) for i in unit):
                    elements = math.prod(item.shape) * self._ways(expert)
                    flat = torch.empty(elements, dtype=item.dtype, device="meta")
                    for match, tensors in self._merge([item], flat, expert):
                        yield from packed.add(match, tensors)

    def _joined(self, names: Sequence[str]) -> Hashable:
        """The set that the tensors of a parameter belong to, which the rollout engine's loader joins; None: to none."""
        return self.model.family.joined_set(names[0]) if len(names) == 1 else None

    def _gathers(self, pairs: list[tuple[_Item, Tensor | None]], expert: bool) -> Iterator[list]:
        """Parameters, with this rank's shards of them, in pieces that are of bounded size once they are gathered."""
        return cut(
            pairs,
            lambda pair: (self._bytes(pair[0]), pair[0].dtype),
            self.bucket_bytes,
            lambda pair: self._joined(pair[0].match.hf_names),
        )

    def _pieces(self, whole: Bucket) -> Iterator[Bucket]:
        """Whole tensors in buckets of bounded size."""
        return cut(
            whole,
            lambda pair: (pair[1].nbytes, pair[1].dtype),
            self.bucket_bytes,
            lambda pair: self._joined([pair[0]]),
        )

    def _bytes(self, item: _Item) -> int:
        """Of all shards of a parameter."""
        return math.prod(item.shape) * self._ways(item.match.row.expert) * item.dtype.itemsize

    def _sent_at_all(self, item: _Item) -> bool:
        return self._sent(item, item.match.row.expert)

    def _sent(self, item: _Item, expert: bool) -> bool:
        tied = self.model.tied_embeddings and item.match.row.megatron == "output_layer.weight"
        return item.match.row.expert == expert and not tied

    @staticmethod
    def _ways(expert: bool) -> int:
        """Over how many ranks the shards of one bucket are spread."""
        if not expert:
            return parallel_state.get_tensor_model_parallel_world_size()
        tensor = int(parallel_state.get_expert_tensor_parallel_world_size() or 1)
        return tensor * parallel_state.get_expert_model_parallel_world_size()

    def _gather(self, bucket: list, expert: bool, stage: int) -> Tensor:
        """[elements of all shards of the bucket], on every rank."""
        if bucket[0][1] is not None:
            flat = torch.cat([self.values(p).reshape(-1) for _, p in bucket])
            flat = _all_gather(flat, _shard_group(expert))
        else:
            flat = self._empty(bucket, self._ways(expert))
        if self.pp_group.size() > 1:
            dist.broadcast(flat, dist.get_global_rank(self.pp_group, stage), group=self.pp_group)
        return flat

    def _gather_to_first(self, bucket: list, expert: bool, stage: int) -> Tensor | None:
        """The same on rank 0, None elsewhere."""
        return self._gather_to(0, bucket, _shard_group(expert), stage, self._ways(expert))

    def _gather_to(self, receiver: int, bucket: list, group: dist.ProcessGroup, stage: int, ways: int) -> Tensor | None:
        """The shards of all ranks of the group that `receiver` is in, or the first rank of the stage where it is of
        another one, on the receiver; None elsewhere."""
        rank, flat = dist.get_rank(), None
        head = receiver if self.places[receiver].stage == stage else self.heads[stage]
        if bucket[0][1] is not None and head in dist.get_process_group_ranks(group):
            shard = torch.cat([self.values(p).reshape(-1) for _, p in bucket])
            flat = shard
            if group.size() > 1:
                flat = self._empty(bucket, ways) if rank == head else None
                shards = None if flat is None else list(flat.chunk(group.size()))
                dist.gather(shard, shards, dst=head, group=group)
        if head != receiver and rank == head:
            assert flat is not None
            dist.send(flat, dst=receiver, group=self.pp_group)
        elif head != receiver and rank == receiver:
            flat = self._empty(bucket, ways)
            dist.recv(flat, src=head, group=self.pp_group)
        return flat if rank == receiver else None

    def _empty(self, bucket: list, ways: int) -> Tensor:
        """Room for all shards of a bucket."""
        elements = sum(math.prod(item.shape) for item, _ in bucket) * ways
        return torch.empty(elements, dtype=bucket[0][0].dtype, device=self.device)

    def _merge(
        self, items: list[_Item], flat: Tensor, expert: bool, only: int | None = None
    ) -> Iterator[tuple[Match, list[Tensor]]]:
        """Cut gathered shards into whole parameters: as what Hugging Face tensors, or parts of them. only: the
        expert-parallel rank whose experts they are; None: of all."""
        expert_ranks = parallel_state.get_expert_model_parallel_world_size() if expert else 1
        ranks = range(expert_ranks) if only is None else (only,)
        flat = flat.view(len(ranks), self._ways(expert) // expert_ranks, -1)
        experts_here = self.model.num_experts // expert_ranks
        offset = 0
        for item in items:
            n, match = math.prod(item.shape), item.match
            for rank, held in zip(ranks, flat, strict=True):
                shards = [part[offset : offset + n].view(item.shape) for part in held]
                if match.expert is not None:  # the item carries the expert of the rank that described it
                    match = replace(match, expert=match.expert % experts_here + rank * experts_here)
                yield match, match.row.transform.merge(shards, self.model)
            offset += n


def _shard_group(expert: bool) -> dist.ProcessGroup:
    """The ranks that hold a parameter's shards together; of experts, tensor ranks within expert ranks."""
    groups = parallel_state
    group = groups.get_expert_tensor_and_model_parallel_group() if expert else groups.get_tensor_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def _all_gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return flat
    out = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_into_tensor(out, flat, group=group)
    return out
