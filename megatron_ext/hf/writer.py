"""A safetensors file, written a tensor at a time: safetensors' own writer wants all of a file's tensors at once.

8 bytes: the header's length, little endian | the header, JSON: name -> dtype, shape, [begin, end) | the values
"""

from __future__ import annotations

import json
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


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
        """The values of a tensor, each once. Raises OSError."""
        self._stream.seek(self._base + self._begins[name])
        self._stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
