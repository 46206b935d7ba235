"""The file that one rank writes of a dist checkpoint, a tensor at a time."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

Sums = dict[str, tuple[int, int]]
"""Name of a file -> (bytes, CRC-32)."""
Items = Iterable[tuple[Any, Tensor | io.BytesIO]]
"""(torch's WriteItem, its values): a tensor of any device, or an object that is serialized."""


class RankFileWriter(dcp.FileSystemWriter):
    """One file a rank. torch's own (2.14.1) keeps the last tensor of every key until the file is closed.

    Those that derive from it say when values are asked for, and in which thread they are written.
    """

    @staticmethod
    def name_of(plan: Any) -> str:
        return f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"

    @staticmethod
    def resolved(plan: Any, planner: Any) -> Iterator[tuple[Any, Tensor | io.BytesIO]]:
        """The items of a plan, objects first, each with its values, which are asked for one by one."""
        for item in sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO):
            data = planner.resolve_data(item)
            yield item, data.detach() if isinstance(data, Tensor) else data

    @torch.no_grad()
    def write_items(self, name: str, items: Items, sums: Sums | None = None) -> list[WriteResult]:
        """One after another into the file of this name. Raises OSError.

        sums: where the file's are put; with them it is brought to the disk too.
        """
        results, crc, size = [], 0, 0
        with open(Path(self.path) / name, "wb") as stream:
            for item, data in items:
                buffer = (serialized(data) if isinstance(data, Tensor) else data).getbuffer()
                where = _StorageInfo(name, size, stream.write(buffer))
                size += where.length
                if sums is not None:
                    crc = zlib.crc32(buffer, crc)
                results.append(WriteResult(item.index, where.length, where))
            if sums is not None:
                stream.flush()
                os.fsync(stream.fileno())
                sums[name] = (size, crc)
        return results


def serialized(tensor: Tensor) -> io.BytesIO:
    """As torch.distributed.checkpoint keeps a tensor in its files."""
    tensor = tensor.cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes the whole storage
    buffer = io.BytesIO()  # written to a file directly, torch.save hides why it failed
    torch.save(tensor, buffer)
    return buffer
