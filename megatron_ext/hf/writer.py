"""Safetensors files, written a tensor at a time: safetensors' own writer wants all of a file's tensors at once.

8 bytes: the header's length, little endian | the header, JSON: name -> dtype, shape, [begin, end) | the values
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

SHARD_BYTES = 5 << 30
CARRIED = "carried.safetensors"
"""Of a model directory, or of the folder beside a checkpoint: the tensors that `companions.Carried` describes."""
CHECKSUMS_KEY = "crc32"
"""In a header's metadata: JSON, tensor -> checksum of its bytes."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWriter:
    """A file whose tensors are known, their values not yet."""

    def __init__(self, stream: BinaryIO, tensors: dict[str, Tensor], *, checksums: bool = False):
        """stream: an empty file. tensors: name -> shape and dtype (float32, bfloat16, float16), on the meta device for
        instance. checksums: of every tensor, in the header once `finish` was called. Raises OSError."""
        self._sums = dict.fromkeys(tensors, "0" * 8) if checksums else None
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        at = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # so every value is aligned
            tensor, self._begins[name] = tensors[name], at
            at += tensor.nbytes
            offsets = [self._begins[name], at]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._stream, self._header = stream, header
        self._base = self._write_header()

    def write(self, name: str, tensor: Tensor) -> None:
        """The values of a tensor of any device, each tensor once. Raises OSError."""
        self._stream.seek(self._base + self._begins[name])
        self._stream.write(_bytes(tensor))
        if self._sums is not None:
            self._sums[name] = checksum(tensor)

    def finish(self) -> None:
        """Every tensor is written: the header once more, with the checksums, which are as long as what stood there."""
        self._write_header()

    def _write_header(self) -> int:
        """At the start of the file; its bytes."""
        if self._sums is not None:
            self._header["__metadata__"][CHECKSUMS_KEY] = json.dumps(self._sums)
        text = json.dumps(self._header).encode()
        text += b" " * (-len(text) % 8)
        self._stream.seek(0)
        return self._stream.write(len(text).to_bytes(8, "little")) + self._stream.write(text)


def checksum(tensor: Tensor) -> str:
    """CRC-32 of its bytes, eight hexadecimal digits."""
    return f"{zlib.crc32(_bytes(tensor)):08x}"


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def write_carried(tensors: dict[str, Tensor], values: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """CARRIED, with checksums: what `write_weights` puts into the index of weights that are written there later.

    tensors: of the shapes and dtypes of the values, on the meta device for instance. Raises OSError.
    """
    partial = directory / f".{CARRIED}.partial"
    with open(partial, "wb") as stream:
        writer = SafetensorsWriter(stream, tensors, checksums=True)
        for name, tensor in values:
            writer.write(name, tensor)
        writer.finish()
    os.replace(partial, directory / CARRIED)


def has_weights(directory: Path) -> bool:
    """Whether `write_weights` has come to its end there."""
    return (directory / _WHOLE).is_file() or (directory / _INDEX).is_file()


def write_weights(
    expected: Iterable[tuple[str, Tensor]],
    values: Iterable[tuple[str, Tensor]],
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write model.safetensors, or numbered shards and their index where one file would be too large, or where the
    directory has CARRIED, whose tensors are in the index too.

    expected: (Hugging Face name, tensor of the shape and dtype that is written), on the meta device for instance.
    values:   the same tensors in the same order with their values, of which one is held at a time.
    shard_bytes: of one file, at most, but for a larger tensor.
    done:     called with the bytes of each tensor that is written.
    Files have hidden names until all are written; what last appears is what `has_weights` looks for. Raises OSError,
    and ValueError where the values are other tensors than those expected.
    """
    shards = _shards(expected, shard_bytes)
    values = iter(values)
    for number, shard in enumerate(shards):
        with open(_partial(directory, number), "wb") as stream:
            writer = SafetensorsWriter(stream, shard)
            left = dict(shard)
            for name, tensor in itertools.islice(values, len(shard)):
                said = left.pop(name, None)
                if said is None or (said.shape, said.dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} was not expected now")
                writer.write(name, tensor)
                done(tensor.nbytes)
            if left:
                raise ValueError(f"no values of {', '.join(left)}")
    if (extra := next(values, None)) is not None:
        raise ValueError(f"{extra[0]} was not expected")
    weight_map, total = _carried(directory)
    if len(shards) == 1 and not weight_map:
        os.replace(_partial(directory, 0), directory / _WHOLE)
        return
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(_partial(directory, number), directory / file)
        weight_map |= dict.fromkeys(shard, file)
    total += sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = directory / f".{_INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / _INDEX)


def _carried(directory: Path) -> tuple[dict[str, str], int]:
    """Name -> file of what is carried there, and its bytes."""
    if not (directory / CARRIED).is_file():
        return {}, 0
    with safe_open(directory / CARRIED, "pt") as opened:
        names = list(opened.keys())
    with open(directory / CARRIED, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little") + 8
    return dict.fromkeys(names, CARRIED), (directory / CARRIED).stat().st_size - header


def _shards(expected: Iterable[tuple[str, Tensor]], limit: int) -> list[dict[str, Tensor]]:
    """Name -> tensor of each file: consecutive ones, of at most `limit` bytes together."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in expected:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _partial(directory: Path, number: int) -> Path:
    return directory / f".model-{number}.safetensors.partial"
