"""The model in Megatron-Core's dist-checkpoint format: every rank writes its shards, any layout reads them.

A checkpoint directory holds Megatron-Core's files (`metadata.json`, `.metadata`, one `__RANK_0.distcp` a rank) and in
`hf/` the files of the Hugging Face model that are not weights. Keys are those of the Transformer Engine spec, so a
checkpoint written without a GPU loads with one, and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.futures import Future

from megatron_ext.checkpoint.names import CheckpointError
from megatron_ext.checkpoint.plain import plain_data, read_metadata
from megatron_ext.checkpoint.planners import LoadPlanner, Resolve, SavePlanner, torch_state
from megatron_ext.checkpoint.rank_file import RankFileWriter
from megatron_ext.mcore import (
    GPTModel,
    ShardedTensor,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    load_preprocess,
    parallel_state,
    replace_keys_with_sharded_keys,
    replace_sharded_keys_with_keys,
    restore_dict_types,
)

_MODEL = {"embedding", "decoder", "output_layer", "mtp", "adapters"}  # what a key of the model begins with


def sharded_state(chunks: Sequence[GPTModel], *, trained: bool = False) -> dict[str, dict[str, Any]]:
    """Megatron-Core's description of this rank's shards: chunk -> name in the chunk -> ShardedTensor or factory.

    trained: of parameters that are trained, and of nothing else.
    Transformer Engine's `_extra_state` is left out: it holds FP8 scales, and would tie a checkpoint to the spec.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {}
    for i, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(metadata=metadata)
        kept = {name for name in entries if not name.endswith("_extra_state")}
        if trained:
            kept &= {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
        state[f"model{i}"] = {name: entry for name, entry in entries.items() if name in kept}
    return state


def save_model(path: Path, chunks: Sequence[GPTModel], *, resolve: Resolve | None = None) -> None:
    """Write the model into an empty directory that every rank sees. All ranks call it together.

    resolve: gives the values of a tensor of the chunks right before they are written, one tensor at a time; so a model
    on the meta device can be written without ever being in memory. What a rank raises, all ranks raise.
    """
    strategy = _SaveOneByOne(resolve or (lambda t: t))
    try:
        dist_checkpointing.save(sharded_state(chunks), str(path), sharded_strategy=strategy)
    except CheckpointException as error:  # torch's wrapping of what any rank raised, an interrupt too
        raise next(iter(error.failures.values()))[0] from error


def load_model(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Read a checkpoint, written in any layout, into the chunks. All ranks call it together.

    Other things in it (an optimizer) are left alone. Raises CheckpointError where the model is another one, or a file
    is damaged.
    """
    state = sharded_state(chunks)
    check_files(path)
    check_model(path, [entry for chunk in state.values() for entry in chunk.values()])
    with plain_data(path):
        loaded = dist_checkpointing.load(state, str(path), LoadInPlace())
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)  # without _extra_state; check_model was strict


def check_files(path: Path) -> None:
    """Raise CheckpointError where a file is not there, or shorter than what is said to be in it."""
    if not (path / ".metadata").is_file() or not (path / "metadata.json").is_file():
        raise CheckpointError(f"{path} is no finished Megatron-Core checkpoint: it has no metadata.json and .metadata")
    ends: dict[str, int] = {}
    for stored in read_metadata(path).storage_data.values():
        end = stored.offset + stored.length
        ends[stored.relative_path] = max(end, ends.get(stored.relative_path, 0))
    for name, end in ends.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size < end:
            raise CheckpointError(f"{file} is cut off: {file.stat().st_size} bytes of at least {end}")


def check_model(path: Path, entries: Sequence[Any]) -> None:
    """Raise CheckpointError naming tensors of the model that the checkpoint lacks, or has in another shape, and those
    that it has and the model does not. The vocabulary may be padded differently. All ranks call it together.

    entries: those of this rank.
    """
    stored = {key: tuple(tensor.size) for key, tensor in stored_tensors(path).items()}
    problems, shards = [], shards_of(entries)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {tensor.key for tensor in shards})
    for key in stored.keys() - set().union(*everyone):
        if key.partition(".")[0] in _MODEL:
            problems.append(f"{key} is in it and not in the model")
    for tensor in shards:
        have, want = stored.get(tensor.key), tuple(tensor.global_shape)
        if have is None:
            problems.append(f"{tensor.key} is not in it")
        elif have != want and not (tensor.allow_shape_mismatch and have[1:] == want[1:]):
            problems.append(f"{tensor.key} is {list(have)}, the model's {list(want)}")
    if problems:
        raise CheckpointError(f"{path} holds another model: {'; '.join(sorted(set(problems)))}")


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Key -> size and dtype of every tensor of a checkpoint. Raises CheckpointError."""
    described = read_metadata(path).state_dict_metadata
    return {key: it for key, it in described.items() if isinstance(it, TensorStorageMetadata)}


def shards_of(entries: Sequence[Any]) -> list[ShardedTensor]:
    """The shards that entries of `sharded_state` stand for; their data are views of the entries'."""
    applied, _, _ = load_preprocess({str(i): entry for i, entry in enumerate(entries)})
    return _leaves(applied)


def _leaves(state: Any) -> list[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [leaf for value in values for leaf in _leaves(value)]


class _SaveOneByOne(TorchDistSaveShardedStrategy):
    """Megatron-Core's format, written synchronously, with one tensor at a time in memory.

    Its own (0.19.2) copies every tensor that is a view first (all gate and up projections: two thirds of the experts)
    and starts a process to pass results.
    """

    def __init__(self, resolve: Resolve):
        super().__init__()
        self.resolve = resolve

    def save(self, sharded_state_dict, checkpoint_dir):
        state, _, _ = replace_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        dcp.save(torch_state(state), storage_writer=_Writer(checkpoint_dir), planner=SavePlanner(self.resolve))


class LoadInPlace(TorchDistLoadShardedStrategy):
    """Megatron-Core's format, read into the tensors of the state, with the plan of `planners.py`."""

    def load(self, sharded_state_dict, checkpoint_dir, async_strategy="mcore"):
        shards, paths, names = replace_keys_with_sharded_keys(sharded_state_dict)
        state = torch_state(shards, loading=True)
        planner = LoadPlanner(_leaves(shards))
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint_dir), planner=planner, no_dist=True)
        read = {
            key: [one.data.detach() for one in held] if isinstance(held[0], ShardedTensor) else state[key]
            for key, held in shards.items()
        }
        loaded = replace_sharded_keys_with_keys(read, paths, names)
        restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _Writer(RankFileWriter):
    """Values are asked for when they are written."""

    def write_data(self, plan, planner):
        name = self.name_of(plan)
        future: Future = Future()
        future.set_result(self.write_items(name, self.resolved(plan, planner)) if plan.items else [])
        return future
