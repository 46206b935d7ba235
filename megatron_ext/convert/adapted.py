"""A checkpoint of adapters: the model that it makes of its base, and its adapters for PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.names import CheckpointError
from megatron_ext.checkpoint.shards import check_files, sharded_state, stored_tensors
from megatron_ext.config import ParallelConfig
from megatron_ext.convert.reader import CheckpointReader
from megatron_ext.convert.tensors import CheckpointTensors, meta_model, model_parts
from megatron_ext.hf.companions import Dtype
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.load import check_tensors, read_shard
from megatron_ext.hf.params import local_parameters
from megatron_ext.hf.tables import Match
from megatron_ext.lora.adapter import Adapter
from megatron_ext.lora.origin import Origin, fingerprint, read_origin
from megatron_ext.lora.targets import choose_targets, layer_name
from megatron_ext.mcore import ShardedTensor


def adapters_in(checkpoint: Path, base: Path | None = None) -> Origin | None:
    """What a checkpoint's adapters are of, in the place where that is now; None: it holds a whole model.

    base: where the model is, if not where it was. Raises CheckpointError where there is none, or another.
    """
    try:
        origin = read_origin(checkpoint)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if origin is None:
        return None
    place = base or origin.base
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} holds adapters, and their model is not in {place}; name it with --base")
    if fingerprint(place) != origin.fingerprint:
        raise CheckpointError(
            f"{checkpoint} holds adapters of other weights than those of {place}; name theirs with --base"
        )
    return Origin(origin.lora, place, origin.fingerprint)


class AdapterReader:
    """A and B of a checkpoint's adapters, whole."""

    def __init__(self, path: Path):
        check_files(path)
        self.path, self.reader = path, CheckpointReader(path)
        self.stored = {k: t for k, t in stored_tensors(path).items() if k.startswith("adapters.")}

    def __call__(self, name: str) -> Tensor:
        """Of "decoder.layers.3.self_attention.linear_qkv.A". Raises CheckpointError where it is not there."""
        key = f"adapters.{name}"
        if key not in self.stored:
            raise CheckpointError(f"{self.path} holds another model: {key} is not in it")
        whole = torch.empty(self.stored[key].size, dtype=self.stored[key].properties.dtype)
        self.reader.fill(ShardedTensor.from_rank_offsets(key, whole))
        return whole

    @property
    def dtype(self) -> Dtype:
        """That the adapters were trained in, and the model with them."""
        kinds = {tensor.properties.dtype for tensor in self.stored.values()}
        return "bfloat16" if torch.bfloat16 in kinds else "float32"


class AdaptedTensors(CheckpointTensors):
    """The Hugging Face tensors of a model with its adapters merged. Needs a world of one rank."""

    def __init__(self, path: Path, model: ModelDescription, origin: Origin):
        """Raises CheckpointError as CheckpointTensors does, and as check_tensors does of the base."""
        self.path, self.model, self.lora = path, model, origin.lora
        self.read = AdapterReader(path)
        self.reader, self.dtype = self.read.reader, self.read.dtype
        chunks = meta_model(model, ParallelConfig(), self.dtype)
        self.config = chunks[0].config
        self.state = sharded_state(chunks)["model0"]
        self.files = TensorFiles(origin.base)
        check_tensors(self.files, local_parameters(chunks, model), model)
        self.targets = {target.row: target.parts for target in choose_targets(model, origin.lora)}
        self.parts, self.own_dtype = model_parts(chunks, model)
        self._held: tuple[str, Adapter] | None = None

    def _read(self, part):
        if ".router." in part.name and isinstance(part.tensor, torch.nn.Parameter) and self.lora.router == "trained":
            return super()._read(part)
        whole = read_shard(self.files, part.match, self.model).to(part.tensor.dtype)
        if part.match.row in self.targets:
            whole = self._adapter(part.match, whole).merged(part.match.expert or 0, whole)
        return part.match.row.transform.merge([whole], self.model)

    def _adapter(self, match: Match, weight: Tensor) -> Adapter:
        """Of a layer; one is held at a time."""
        name = layer_name(match)
        if self._held is None or self._held[0] != name:
            experts = range(self.model.num_experts) if match.row.expert else [None]
            matches = [Match(match.row, match.layer, expert) for expert in experts]
            adapter = Adapter(matches, weight, self.targets[match.row], self.model, self.lora, self.config)
            for kind, parameter in (("A", adapter.A), ("B", adapter.B)):
                stored = self.read(f"{name}.{kind}")
                if stored.shape != parameter.shape:
                    raise CheckpointError(f"{self.path} holds another model: {name}.{kind} is {list(stored.shape)}")
                parameter.data = stored
            self._held = name, adapter
        return self._held[1]
