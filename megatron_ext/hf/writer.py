"""Safetensors files, written a tensor at a time: safetensors' own writer wants all of a file's tensors at once.

8 bytes: the header's length, little endian | the header, JSON: name -> dtype, shape, [begin, end) | the values
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

SHARD_BYTES = 5 << 30
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWriter:
    """A file whose tensors are known, their values not yet."""

    def __init__(self, stream: BinaryIO, tensors: dict[str, Tensor]):
        """stream: an empty file. tensors: name -> shape and dtype (float32, bfloat16), on the meta device for instance.
        Raises OSError."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        at = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # so every value is aligned
            tensor, self._begins[name] = tensors[name], at
            at += tensor.nbytes
            offsets = [self._begins[name], at]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._stream = stream
        self._base = stream.write(len(text).to_bytes(8, "little")) + stream.write(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The values of a tensor of any device, each tensor once. Raises OSError."""
        self._stream.seek(self._base + self._begins[name])
        self._stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


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
    """Write model.safetensors, or numbered shards and their index where one file would be too large.

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
    if len(shards) == 1:
        os.replace(_partial(directory, 0), directory / _WHOLE)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(_partial(directory, number), directory / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = directory / f".{_INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / _INDEX)


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
