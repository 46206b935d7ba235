"""A piece of the stream of weights: whole tensors under Hugging Face names, of bounded size together. And how a stream
is cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

Bucket = list[tuple[str, Tensor]]


def join_small(buckets: Iterable[Bucket], limit: int) -> Iterator[Bucket]:
    """The same stream; buckets in a row become one of at most `limit` bytes, which may have several dtypes. No more
    than that is held beside the bucket that comes."""
    held: Bucket = []
    for bucket in buckets:
        if held and sum(tensor.nbytes for _, tensor in held + bucket) > limit:
            yield held
            held = []
        if held or sum(tensor.nbytes for _, tensor in bucket) <= limit:
            held = held + bucket
        else:
            yield bucket
    if held:
        yield held


def together[T](items: Sequence[T], set_of: Callable[[T], Hashable]) -> list[list[T]]:
    """Items in their order, those of one set side by side at the place of its first. set_of: None for an item that is
    in no set."""
    units: list[list[T]] = []
    begun: dict[Hashable, list[T]] = {}
    for item in items:
        key = set_of(item)
        if key is not None and key in begun:
            begun[key].append(item)
            continue
        units.append([item])
        if key is not None:
            begun[key] = units[-1]
    return units


def cut[T](
    items: Sequence[T],
    size_of: Callable[[T], tuple[int, torch.dtype]],
    limit: int,
    set_of: Callable[[T], Hashable],
) -> Iterator[list[T]]:
    """Pieces of one dtype and of at most `limit` bytes together, none of which ends within a set.

    size_of: (bytes, dtype) of an item. What is larger than the limit, an item or a set, is a piece of its own. Raises
    ValueError for a set of several dtypes.
    """
    piece: list[T] = []
    filled, kind = 0, None
    for unit in together(items, set_of):
        sizes = [size_of(item) for item in unit]
        nbytes, (dtype, *others) = sum(size for size, _ in sizes), {dtype for _, dtype in sizes}
        if others:
            raise ValueError(f"tensors that travel together have several dtypes: {sizes}")
        if piece and (filled + nbytes > limit or dtype != kind):
            yield piece
            piece, filled = [], 0
        piece += unit
        filled, kind = filled + nbytes, dtype
    if piece:
        yield piece
