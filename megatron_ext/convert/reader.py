"""Parts of a dist checkpoint, in any order and size.

Megatron-Core's own load (0.19.2) reads a key as a whole; a key holds that parameter of all layers and experts.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.serialization import skip_data

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
        self._sound: set[MetadataIndex] = set()  # parts whose checksums were right
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
        """A part as it lies in its file, mapped into memory. Its checksums are looked at when it is first read."""
        index = MetadataIndex(key, torch.Size(at))
        stored = self.storage[index]
        file = self.path / stored.relative_path
        begin = stored.offset % mmap.ALLOCATIONGRANULARITY
        with open(file, "rb") as stream:  # mapped as copy on write: torch warns of memory that cannot be written
            content = memoryview(
                mmap.mmap(
                    stream.fileno(), begin + stored.length, offset=stored.offset - begin, access=mmap.ACCESS_COPY
                )
            )[begin:]
        try:
            tensor = _view(content, check=index not in self._sound)
        except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} is damaged at byte {stored.offset}, where {key} lies: {error}") from error
        self._sound.add(index)
        return tensor


def _view(content: memoryview, *, check: bool) -> Tensor:
    """The tensor that `torch.save` made into these bytes, on these bytes. check: look at the checksums, as torch does
    not."""
    stream = _Stream(content)
    with zipfile.ZipFile(stream) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if check:
        for name, info in records.items():
            begin = _begin(content, info)
            if zlib.crc32(content[begin : begin + info.file_size]) != info.CRC:
                raise zipfile.BadZipFile(f"the checksum of {name} is wrong")
    stream.seek(0)
    with skip_data():
        tensor = torch.load(stream, weights_only=True)
    values, size = records.get("data/0"), tensor.untyped_storage().nbytes()
    if values is None or values.file_size != size:
        raise zipfile.BadZipFile(f"it does not hold the {size} bytes of one tensor")
    if not size:
        return tensor
    flat = torch.frombuffer(content, dtype=tensor.dtype, count=size // tensor.itemsize, offset=_begin(content, values))
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _begin(content: memoryview, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin: after its local header, a name and an extra field (PKWARE APPNOTE 4.3.7)."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{info.filename} is compressed")
    return info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26))


class _Stream(io.RawIOBase):
    """Bytes as a file, not copied."""

    def __init__(self, content: memoryview):
        self.content, self.at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: len(self.content)}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        part = self.content[self.at : self.at + len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)
