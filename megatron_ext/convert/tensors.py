"""What a conversion reads and writes, a tensor at a time.

The model is built on the meta device: Megatron-Core says which shards there are and how they are called, the family's
table says what is in them, and no rank ever holds more than a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.names import HF_FOLDER, CheckpointError
from megatron_ext.checkpoint.shards import (
    check_files,
    check_model,
    save_model,
    sharded_state,
    shards_of,
    stored_tensors,
)
from megatron_ext.config import ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.convert.comparison import TORCH_DTYPES, Advance, ahead
from megatron_ext.convert.reader import CheckpointReader
from megatron_ext.hf.companions import Dtype
from megatron_ext.hf.description import ModelDescription, read_description
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.load import check_tensors, read_shard
from megatron_ext.hf.packed import PackedExperts
from megatron_ext.hf.params import local_parameters
from megatron_ext.hf.tables import Match
from megatron_ext.hf.writer import write_weights
from megatron_ext.mcore import GPTModel, is_main_replica
from megatron_ext.model.build import build_model

Watch = Callable[[int], AbstractContextManager[Advance]]
"""From the bytes that there are to do."""

_EMBEDDING = "embedding.word_embeddings.weight"


def meta_model(model: ModelDescription, parallel: ParallelConfig, dtype: Dtype) -> list[GPTModel]:
    """This rank's chunks, without storage."""
    trainer = TrainerConfig(extra={"perform_initialization": False})
    with torch.device("meta"):
        return build_model(model, parallel, trainer, TrainerPrecision(weights=dtype), replay=False)[1]


def write_checkpoint(hf_dir: Path, out: Path, parallel: ParallelConfig, dtype: Dtype, watch: Watch) -> None:
    """This rank's part of a checkpoint of a model directory, into an empty directory. All ranks call it together.

    Raises as `check_tensors` does, before anything is written.
    """
    model, files = read_description(hf_dir), TensorFiles(hf_dir)
    chunks = meta_model(model, parallel, dtype)
    parameters = local_parameters(chunks, model)
    check_tensors(files, parameters, model)
    by_storage = {_storage(p): (p, match) for _, p, match in parameters}
    held: dict[int, Tensor] = {}  # Megatron-Core writes gate and up, views of one parameter, one after the other

    def resolve(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in held:
            parameter, match = by_storage[key]
            held.clear()
            held[key] = read_shard(files, match, model).to(parameter.dtype).contiguous()
        advance(tensor.nbytes)
        # An own tensor may be a view of its file: where it begins counts.
        offset = held[key].storage_offset() + tensor.storage_offset()
        return held[key].as_strided(tensor.size(), tensor.stride(), offset)

    entries = [entry for chunk in sharded_state(chunks).values() for entry in chunk.values()]
    with watch(sum(s.data.nbytes for s in shards_of(entries) if is_main_replica(s.replica_id))) as advance:
        save_model(out, chunks, resolve=resolve)


def _storage(tensor: Tensor) -> int:
    """What a tensor has in common with its views, on the meta device too."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Part:
    """A parameter of the model, and the Hugging Face tensors, or parts of them, that it becomes."""

    name: str
    tensor: Tensor
    match: Match
    outputs: list[Tensor]


def model_parts(chunks: list[GPTModel], model: ModelDescription) -> tuple[list[Part], set[str]]:
    """Of a model on the meta device, and the names of tensors whose dtype is not the model's to choose: routing
    biases."""
    parts, own_dtype = [], set[str]()
    for name, tensor, match in local_parameters(chunks, model):
        parts.append(Part(name, tensor, match, match.row.transform.merge([tensor.to("meta")], model)))
        if not isinstance(tensor, torch.nn.Parameter):
            own_dtype.update(match.hf_names)
    return parts, own_dtype


class CheckpointTensors:
    """The Hugging Face tensors of a checkpoint. Needs a world of one rank."""

    def __init__(self, path: Path, model: ModelDescription):
        """Raises CheckpointError where the checkpoint is damaged or another model's."""
        check_files(path)
        self.path, self.model, self.reader = path, model, CheckpointReader(path)
        stored = stored_tensors(path)
        if _EMBEDDING not in stored:
            raise CheckpointError(f"{path} holds another model: {_EMBEDDING} is not in it")
        self.dtype: Dtype = "bfloat16" if stored[_EMBEDDING].properties.dtype == torch.bfloat16 else "float32"
        chunks = meta_model(model, ParallelConfig(), self.dtype)
        self.state = sharded_state(chunks)["model0"]
        check_model(path, list(self.state.values()))
        self.parts, self.own_dtype = model_parts(chunks, model)

    def outputs(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor without storage) of everything that `stream` gives, in its order."""
        packed = PackedExperts(self.model.num_experts)
        for part in self.parts:
            yield from packed.add(part.match, part.outputs)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), each once."""
        packed = PackedExperts(self.model.num_experts)
        for part in self.parts:
            yield from packed.add(part.match, self._read(part))

    def _read(self, part: Part) -> list[Tensor]:
        entry = self.state[part.name]
        entry.data = torch.empty(part.tensor.shape, dtype=part.tensor.dtype)
        for shard in shards_of([entry]):
            self.reader.fill(shard)
        whole, entry.data = entry.data, part.tensor
        return part.match.row.transform.merge([whole], self.model)


def write_hf(checkpoint: CheckpointTensors, out: Path, dtype: Dtype, shard_bytes: int, advance: Advance) -> None:
    """The weights of a checkpoint as safetensors files with an index, or as one file where that is enough."""

    def as_written(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in checkpoint.own_dtype else tensor.to(TORCH_DTYPES[dtype])

    write_weights(
        ((name, as_written(name, tensor)) for name, tensor in checkpoint.outputs()),
        ((name, as_written(name, tensor)) for name, tensor in ahead(checkpoint.stream())),
        out,
        shard_bytes=shard_bytes,
        done=advance,
    )


def hf_of_checkpoint(path: Path, given: Path | None) -> Path:
    """The folder with the files of the Hugging Face model: given, or in the checkpoint. Raises CheckpointError."""
    folder = given or path / HF_FOLDER
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; name a directory of the Hugging Face model with --hf")
    return folder
