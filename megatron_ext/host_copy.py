"""Storages that lie in host memory for a while: their own memory is given back, and every view of them stays a view.

A tensor's storage is resized to nothing, so that parameters, their slices in Megatron-Core's buffers and what an
optimizer holds of them need not know. On a GPU the host's memory is page-locked, which copies need to be fast. It comes
in blocks of a power of two, because PyTorch's allocator of such memory rounds up to one, and it is kept from one time
to the next, because it is slow to get.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

_BLOCK = 1 << 30


class HostCopy:
    """Of some storages of one device. block: bytes of host memory that are allocated at once."""

    def __init__(self, device: torch.device, block: int = _BLOCK):
        self.device, self.block = device, block
        self._blocks: list[Tensor] = []
        self._away: list[tuple[UntypedStorage, int]] = []
        self._dropped: list[tuple[UntypedStorage, int]] = []

    @property
    def away(self) -> bool:
        """Whether the device's memory is given back."""
        return bool(self._away or self._dropped)

    @property
    def bytes(self) -> int:
        """Of host memory, that is kept."""
        return len(self._blocks) * self.block

    def take(self, kept: Iterable[Tensor], dropped: Iterable[Tensor] = ()) -> None:
        """Give back the memory of these tensors' storages. kept: their bytes come back; dropped: zeros do. Of tensors
        on other devices, and of storages that are away, nothing happens."""
        assert not self.away, "it has storages already"
        keeping = [(storage, storage.nbytes()) for storage in storages(kept, self.device)]
        seen = {storage._cdata for storage, _ in keeping}
        dropping = [(s, s.nbytes()) for s in storages(dropped, self.device) if s._cdata not in seen]
        for piece, host in self._pieces(keeping):
            host.copy_(piece, non_blocking=True)
        self._wait()
        for storage, _ in keeping + dropping:
            storage.resize_(0)
        self._away, self._dropped = keeping, dropping

    def give_back(self) -> None:
        """Everything as it was."""
        for storage, size in self._away + self._dropped:
            storage.resize_(size)
        for piece, host in self._pieces(self._away):
            piece.copy_(host, non_blocking=True)
        for storage, _ in self._dropped:
            _bytes(storage).zero_()
        self._wait()
        self._away, self._dropped = [], []

    def _pieces(self, held: list[tuple[UntypedStorage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of a storage, its place in a block), uint8, of one length each; the storages lie one behind another."""
        at = 0
        for storage, size in held:
            device, start = _bytes(storage), 0
            while start < size:
                number, offset = divmod(at, self.block)
                if number == len(self._blocks):
                    pinned = self.device.type == "cuda"
                    self._blocks.append(torch.empty(self.block, dtype=torch.uint8, pin_memory=pinned))
                length = min(size - start, self.block - offset)
                yield device[start : start + length], self._blocks[number][offset : offset + length]
                start, at = start + length, at + length

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def storages(tensors: Iterable[Tensor], device: torch.device) -> list[UntypedStorage]:
    """Each storage once that has memory on this device."""
    found = {s._cdata: s for t in tensors if t.device == device and (s := t.untyped_storage()).nbytes()}
    return list(found.values())


def _bytes(storage: UntypedStorage) -> Tensor:
    """[bytes] uint8, over the whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
