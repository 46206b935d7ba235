"""This rank's weights under global names: layers and experts counted over the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.tables import Match, match_parameters
from megatron_ext.mcore import GPTModel, parallel_state

ADAPTERS = "adapters"
"""Of a chunk: the module of its LoRA adapters, which are no weights of the model (`megatron_ext.lora`)."""


def local_parameters(
    chunks: Sequence[GPTModel], model: ModelDescription, *, value_head: bool = False
) -> list[tuple[str, Tensor, Match]]:
    """(global name, tensor, its table row) of every parameter and persistent buffer of the model that this rank holds,
    in module order, the buffers of a chunk after its parameters.

    value_head: leave the output layer out; it is no LM head.

    Raises KeyError where one has no row.
    """
    experts_here = model.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = experts_here * parallel_state.get_expert_model_parallel_rank()
    named: list[tuple[str, Tensor]] = []
    for chunk in chunks:
        layers = chunk.decoder.layers

        def layer_name(found: re.Match[str], layers=layers) -> str:
            return f"decoder.layers.{layers[int(found[1])].layer_number - 1}."

        for name, parameter in (*chunk.named_parameters(), *_persistent_buffers(chunk)):
            if name.startswith(f"{ADAPTERS}.") or (value_head and name.startswith("output_layer.")):
                continue
            name = re.sub(r"^decoder\.layers\.(\d+)\.", layer_name, name)
            name = re.sub(
                r"(\.experts\.linear_fc\d\.(?:weight|bias))(\d+)$",
                lambda m: f"{m[1]}{first_expert + int(m[2])}",
                name,
            )
            named.append((name, parameter))
    matches = match_parameters(model.family.table, [n for n, _ in named], tied_embeddings=model.tied_embeddings)
    return [(name, parameter, matches[name]) for name, parameter in named]


def _persistent_buffers(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def shard_position(match: Match) -> tuple[int, int]:
    """(rank, size) of the group whose ranks hold the tensor-parallel shards of a parameter."""
    if match.row.expert:
        return (
            int(parallel_state.get_expert_tensor_parallel_rank() or 0),
            int(parallel_state.get_expert_tensor_parallel_world_size() or 1),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
