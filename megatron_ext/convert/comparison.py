"""Tensors that were written, beside those that they were made from. Megatron-Core is not needed for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from megatron_ext.hf.companions import Dtype
from megatron_ext.hf.files import TensorFiles

Advance = Callable[[int], None]
"""Called with the bytes of each tensor that is done."""
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Streamed(Protocol):
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor), each once."""
        ...


class ConversionError(RuntimeError):
    """What was written is not what was read; the message names the tensor."""


def source_dtype(files: TensorFiles, spare: Collection[str] = ()) -> Dtype:
    """The dtype of a model directory: that of its largest tensor besides the spare ones, which are not converted.
    Raises ConversionError where it has to be chosen."""
    largest = max(files.shapes.keys() - spare, key=lambda name: math.prod(files.shapes[name]))
    names: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16"}
    if files.dtypes[largest] not in names:
        raise ConversionError(f"{largest} is {files.dtypes[largest]}; choose --dtype float32 or --dtype bfloat16")
    return names[files.dtypes[largest]]


@dataclass
class Comparison:
    """tensors: compared and equal, bit for bit after the cast. cast: of these, changed by the cast."""

    tensors: int = 0
    cast: list[str] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        """Tensors that were compared besides."""
        self.tensors += other.tensors
        self.cast += other.cast


def compare(made: Streamed, files: TensorFiles, *, to_hf: bool, advance: Advance) -> Comparison:
    """Read both sides back: each tensor of one side, cast to the dtype of the other, is that of the other.

    to_hf: whether the files were made from what streams, or the other way round.
    Raises ConversionError naming the first tensor that differs.
    """
    out = Comparison()
    for name, ours in ahead(made.stream()):
        theirs = files[name]
        source, target = (ours, theirs) if to_hf else (theirs, ours)
        expected = source.to(target.dtype)
        if not _same_bits(expected, target):
            raise ConversionError(f"{name} was not written as it was read")
        out.tensors += 1
        if source.dtype != target.dtype and not torch.equal(expected.to(source.dtype), source):
            out.cast.append(name)
        advance(ours.nbytes)
    return out


def ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one being made in a thread while one is used: checksums and copies let others run."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, items, end)
            yield cast("T", item)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """As integers, so that NaN equals itself and 0 differs from -0; eight bytes at once where they divide."""
    a, b = (tensor.contiguous().view(-1) for tensor in (a, b))
    wide = all(t.nbytes % 8 == 0 and t.storage_offset() * t.itemsize % 8 == 0 for t in (a, b))
    integer = torch.int64 if wide else {2: torch.int16, 4: torch.int32}[a.itemsize]
    return torch.equal(a.view(integer), b.view(integer))
