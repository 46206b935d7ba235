"""The adapter of one linear layer: y += alpha / rank B A x (2106.09685, section 4.1).

A layer of Megatron-Core may hold several matrices of Hugging Face: queries, keys and values; gate and up; the experts
of this rank. Each matrix has an A and a B of its own.

    A    [experts, matrices, rank, in]             for one matrix of one layer, [1, 1, rank, in]
    B    [experts, blocks, out / blocks, rank]     rows as in the layer's weight, each of one matrix

Rows of matrices without an adapter are there in B and stay 0. blocks is 2 where gate and up are joined, so that every
layout cuts B along one dimension.

What tensor-parallel ranks hold, and what they exchange, which is of the rank's width and no wider:

    column-parallel    A whole, B cut.  A x is gathered over the sequence (or its gradient summed), then B's rows
    row-parallel       A cut, B whole.  A x is summed over the ranks, and scattered over the sequence
    on every rank      both whole
    experts            as the first two without an exchange: tokens are gathered and summed by the dispatcher. What is
                       whole, A or B, gets a part of its gradient on each rank, and these are summed

Under sequence parallelism a rank differentiates what is whole by its own tokens; Megatron-Core sums such gradients.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.config import LoraConfig
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.params import shard_position
from megatron_ext.hf.tables import Match
from megatron_ext.hf.transforms import GateUp, Replicated, Split, Transposed
from megatron_ext.lora.targets import layer_name
from megatron_ext.mcore import (
    ShardedTensor,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    parallel_state,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)

Kind = Literal["column", "row", "whole"]
"""How tensor-parallel ranks divide a linear layer: by rows of its weight, by columns, or not."""


def kind_of(match: Match) -> Kind:
    """Of the layer that a parameter belongs to."""
    transform = match.row.transform
    transform = transform.inner if isinstance(transform, Transposed) else transform
    if isinstance(transform, Replicated):
        return "whole"
    return "row" if transform == Split(1) else "column"


class Adapter(torch.nn.Module):
    """Of one linear layer of this rank; see the module."""

    one_hot: Tensor | None

    def __init__(
        self,
        matches: Sequence[Match],
        weight: Tensor,
        parts: Sequence[int],
        model: ModelDescription,
        lora: LoraConfig,
        config: TransformerConfig,
    ):
        """matches: of the layer's weights, the experts' in their order. weight: [out, in] of this rank, any of them.
        parts: of the Hugging Face tensors of each, those that have an adapter. A is left empty, B is 0."""
        super().__init__()
        self.matches, self.parts, self.model, self.lora = list(matches), tuple(parts), model, lora
        (first, *_), self.config = self.matches, config
        self.kind, self.expert = kind_of(first), first.row.expert
        self.rank, self.ways = shard_position(first)
        transform = first.row.transform
        inner = transform.inner if isinstance(transform, Transposed) else transform
        self.blocks = 2 if isinstance(inner, GateUp) else 1
        out, width = weight.shape
        like = {"dtype": weight.dtype, "device": weight.device}
        count = len(self.matches)
        self.A = torch.nn.Parameter(torch.empty(count, len(self.parts), lora.rank, width, **like))
        self.B = torch.nn.Parameter(torch.zeros(count, self.blocks, out // self.blocks, lora.rank, **like))
        self._mark()
        owner = self._owner(weight)
        one_hot = (owner[:, None] == torch.tensor(self.parts)).to(weight.dtype)
        joined = len(first.hf_names) > 1
        self.register_buffer("one_hot", one_hot.to(weight.device) if joined else None, persistent=False)

    def _mark(self) -> None:
        """What Megatron-Core asks of a parameter: over which ranks its gradient is summed."""
        for parameter, axis, cut in ((self.A, 3, self.kind == "row"), (self.B, 2, self.kind == "column")):
            set_tensor_model_parallel_attributes(parameter, cut and self.ways > 1, axis, 1)
            if self.expert:
                parameter.allreduce = False  # over the ranks that hold the same experts
            else:
                parameter.sequence_parallel = self.config.sequence_parallel and not cut

    def _owner(self, weight: Tensor) -> Tensor:
        """[out] int64: which Hugging Face tensor each row of this rank's weight comes from."""
        transform = self.matches[0].row.transform
        shards = [torch.empty(weight.shape, device="meta")] * self.ways
        wholes = transform.merge(shards, self.model)
        if len(wholes) == 1:
            return torch.zeros(len(weight), dtype=torch.int64)
        numbers = [torch.full((len(w), 1), i) for i, w in enumerate(wholes)]
        return transform.shard(numbers, self.model, self.rank, self.ways)[:, 0]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """A uniform in +-1 / sqrt(in), as PEFT has it, B 0. From the seed and the names alone, so that every layout
        begins with the same."""
        width = self.A.shape[-1] * (self.ways if self.kind == "row" else 1)
        for i, match in enumerate(self.matches):
            for j, part in enumerate(self.parts):
                name = f"{match.hf_names[part]}:{match.expert if match.row.packed else ''}"
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
                whole = torch.empty(self.lora.rank, width).uniform_(-1, 1, generator=generator) * width**-0.5
                mine = whole.chunk(self.ways, 1)[self.rank] if self.kind == "row" else whole
                self.A[i, j].copy_(mine)
        self.B.zero_()

    def forward(self, x: Tensor, tokens_per_expert: Any = None) -> Tensor:
        """x: what the linear layer multiplies, [tokens, rows, in], or of experts [tokens sorted by expert, in]. Returns
        what to add to its output, of the same shape as that."""
        a, b = self.A.flatten(1, 2), self._spread(self.B)
        if self.expert:
            return self._of_experts(x, a, b, [int(n) for n in tokens_per_expert])
        hidden = F.linear(x, a[0])
        group = parallel_state.get_tensor_model_parallel_group()
        if self.ways > 1 and self.kind == "column":
            if self.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=group)
            else:
                hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        elif self.ways > 1 and self.kind == "row":
            if self.config.sequence_parallel:
                hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=group)
            else:
                hidden = reduce_from_tensor_model_parallel_region(hidden, group=group)
        return F.linear(hidden * self.lora.scale, b[0])

    def _of_experts(self, x: Tensor, a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
        if self.ways > 1:  # its gradient is summed; forward it is the same
            group = parallel_state.get_expert_tensor_parallel_group()
            if self.kind == "column":
                a = copy_to_tensor_model_parallel_region(a, group=group)
            else:
                b = copy_to_tensor_model_parallel_region(b, group=group)
        return grouped_linear(grouped_linear(x, a, counts) * self.lora.scale, b, counts)

    def _spread(self, b: Tensor) -> Tensor:
        """B -> [experts, out, matrices x rank]: what multiplies the A x of all matrices, each row those of its own."""
        b = b.flatten(1, 2)
        if self.one_hot is None:
            return b
        return (b[:, :, None] * self.one_hot[:, :, None]).flatten(2)

    @torch.no_grad()
    def merged(self, number: int, weight: Tensor) -> Tensor:
        """W + alpha / rank B A of the `number`-th weight, [out, in] of this rank, computed in float32 and rounded once.
        No rank needs anything of another."""
        b = self._spread(self.B[number : number + 1])[0].float()
        return torch.addmm(weight.float(), b, self.A[number].flatten(0, 1).float(), alpha=self.lora.scale).to(
            weight.dtype
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron-Core's description of A and B, under keys that name the layer of the whole model."""
        key = f"adapters.{layer_name(self.matches[0])}"
        experts = []
        if self.expert:
            groups = parallel_state
            ranks = (groups.get_expert_model_parallel_rank(), groups.get_expert_model_parallel_world_size())
            experts = [(0, *ranks)]
            replica = groups.get_expert_data_parallel_rank()
        else:
            replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        state = {}
        for name, parameter, axis in (("A", self.A, 3), ("B", self.B, 2)):
            cut = self.kind == ("row" if name == "A" else "column")
            state[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                f"{key}.{name}",
                parameter,
                *experts,
                *([(axis, self.rank, self.ways)] if cut else []),
                replica_id=(0, 0 if cut else self.rank, replica),
            )
        return state


class Adapters(torch.nn.Module):
    """All of one chunk."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Of all of them."""
        state: dict[str, Any] = {}
        for name, adapter in self.named_children():
            assert isinstance(adapter, Adapter)
            state |= adapter.sharded_state_dict(f"{prefix}{name}.")
        return state


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int], *, kernel: bool | None = None) -> Tensor:
    """x: [tokens sorted by group, in]; weights: [groups, out, in]; counts: tokens of each. Returns [tokens, out].

    kernel: torch's grouped one, which takes bfloat16 alone and widths of whole 16 bytes, and has no gradient of no
    token; None: where it can on a GPU.
    """
    if kernel is None:
        kernel = x.is_cuda and x.dtype == torch.bfloat16 and not any(n % 8 for n in weights.shape[1:])
    if kernel and len(x):
        ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=x.device)
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(list(counts)), weights, strict=True)])
