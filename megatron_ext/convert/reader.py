"""Parts of a dist checkpoint, in any order and size.

Megatron-Core's own load (0.19.2) reads a key as a whole; a key holds that parameter of all layers and experts.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint import CheckpointError
from megatron_ext.mcore import ShardedTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in the whole tensor of a key."""


class CheckpointReader:
    """The tensors of one checkpoint directory."""

    def __init__(self, path: Path):
        self.path = path
        metadata = FileSystemReader(path).read_metadata()
        self.storage = metadata.storage_data
        # A key's boxes by their first offset, the layer or expert where there is such an axis: few stand under each.
        self.boxes: dict[str, dict[int, list[Box]]] = {}
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                by_first = self.boxes.setdefault(key, {})
                for chunk in stored.chunks:
                    by_first.setdefault(chunk.offsets[0], []).append((tuple(chunk.offsets), tuple(chunk.sizes)))

    def fill(self, tensor: ShardedTensor) -> None:
        """Read the values of `tensor.data`. Raises CheckpointError where a part is damaged or not there."""
        offsets = tuple(tensor.global_offset)
        data = tensor.data.view((1,) * tensor.prepend_axis_num + tuple(tensor.local_shape))
        filled = 0
        for at, size in self._overlapping(tensor.key, (offsets, tuple(data.shape))):
            low = [max(a, b) for a, b in zip(offsets, at, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, data.shape, at, size, strict=True)]
            part = self._load(tensor.key, at)[tuple(slice(i - b, j - b) for i, j, b in zip(low, high, at, strict=True))]
            data[tuple(slice(i - a, j - a) for i, j, a in zip(low, high, offsets, strict=True))] = part
            filled += part.numel()
        if filled != data.numel():
            raise CheckpointError(f"{self.path} holds {filled} of {data.numel()} values of {tensor.key} at {offsets}")

    def _overlapping(self, key: str, box: Box) -> Iterator[Box]:
        for first, boxes in self.boxes[key].items():
            if first < box[0][0] + box[1][0]:
                for at, size in boxes:
                    if all(a < b + m and b < a + n for a, n, b, m in zip(*box, at, size, strict=True)):
                        yield at, size

    def _load(self, key: str, at: tuple[int, ...]) -> Tensor:
        stored = self.storage[MetadataIndex(key, torch.Size(at))]
        file = self.path / stored.relative_path
        with open(file, "rb") as stream:
            stream.seek(stored.offset)
            content = stream.read(stored.length)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load does not look at the checksums
                if (name := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {name} is wrong")
            return torch.load(io.BytesIO(content), weights_only=True)
        except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} is damaged at byte {stored.offset}, where {key} lies: {error}") from error
