"""Parts of a dist checkpoint, in any order and size.

Megatron-Core's own load (0.19.2) reads a key as a whole; a key holds that parameter of all layers and experts.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint.names import CheckpointError
from megatron_ext.checkpoint.plain import explained, read_metadata
from megatron_ext.checkpoint.planners import Place, by_place, unit_axes
from megatron_ext.mcore import ShardedTensor

_FOLDER = 0x10  # of MS-DOS's attributes of a file
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in the whole tensor of a key."""


class CheckpointReader:
    """The tensors of one checkpoint directory."""

    def __init__(self, path: Path):
        self.path = path
        metadata = read_metadata(path)
        self.storage = metadata.storage_data
        # A key's boxes by layer and expert, where it has them: few share these.
        self.boxes: dict[str, tuple[tuple[int, ...], dict[Place, list[Box]]]] = {}
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                axes = unit_axes(stored.chunks)
                boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
                places = by_place(stored.chunks, axes)
                self.boxes[key] = axes, {place: [boxes[n] for n in numbers] for place, numbers in places.items()}

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
        axes, places = self.boxes[key]
        for place in product(*(range(box[0][axis], box[0][axis] + box[1][axis]) for axis in axes)):
            for at, size in places.get(place, ()):
                if all(a < b + m and b < a + n for a, n, b, m in zip(*box, at, size, strict=True)):
                    yield at, size

    def _load(self, key: str, at: tuple[int, ...]) -> Tensor:
        stored = self.storage[MetadataIndex(key, torch.Size(at))]
        file = self.path / stored.relative_path
        with open(file, "rb") as stream:
            stream.seek(stored.offset)
            content = io.BytesIO(stream.read(stored.length))
        try:
            return saved_tensor(content)
        except (zipfile.BadZipFile, struct.error, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file} is damaged at byte {stored.offset}, where {key} lies: {explained(error)}"
            ) from error


def saved_tensor(file: io.BytesIO) -> Tensor:
    """The tensor that `torch.save` wrote. torch.load (2.14.1) looks at no checksums, zipfile does.

    Raises BadZipFile where a checksum is wrong; what is damaged in other ways, zipfile and torch find in theirs.
    """
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():  # of what says that it is a folder, torch reads nothing and says nothing
            if record.compress_type != zipfile.ZIP_STORED or record.external_attr & _FOLDER:
                raise zipfile.BadZipFile(f"{record.filename} does not lie there as it is")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged.partition('/')[2]} is wrong")
    file.seek(0)
    return torch.load(file, weights_only=True)
