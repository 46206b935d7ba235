"""Many small arrays travel as a few large ones: 250 answers have a thousand, and a message counts each of its arrays.

A process sends `JoinedRows(samples)` and another receives the same objects: pickle calls what is here. Arrays of one
field are one array on the way where they are small and have one dtype and one shape behind the first axis; any others
go as they are. Those that arrive are parts of it, without a copy: like every array out of Ray's store they cannot be
written to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_LARGE = 1 << 16  # bytes an array, on average: a copy of it costs more than that it is counted

Arrays = tuple[np.ndarray, list[int]] | list[Any]
"""Arrays one behind the other along their first axis, and how long each is; or values as they are."""


def join(values: Sequence[Any]) -> Arrays:
    """See `Arrays`."""
    first = values[0] if values else None
    if not isinstance(first, np.ndarray) or not first.ndim:
        return list(values)
    kind = first.dtype, first.shape[1:]
    if not all(isinstance(v, np.ndarray) and v.ndim and (v.dtype, v.shape[1:]) == kind for v in values):
        return list(values)
    if sum(v.nbytes for v in values) > _LARGE * len(values):
        return list(values)
    return np.concatenate(values), [len(v) for v in values]


def split(arrays: Arrays) -> list[Any]:
    """What `join` was given."""
    if isinstance(arrays, list):
        return arrays
    flat, lengths = arrays
    ends = list(itertools.accumulate(lengths))
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@dataclass
class JoinedRows[T]:
    """Objects of one class, each with the fields that it is made of in its __dict__, as dataclasses have them."""

    rows: list[T]

    def __getstate__(self) -> tuple[Any, int, dict[str, Arrays]]:
        if not self.rows:
            return None, 0, {}
        fields = {name: join([vars(row)[name] for row in self.rows]) for name in vars(self.rows[0])}
        return type(self.rows[0]), len(self.rows), fields

    def __setstate__(self, state: tuple[Any, int, dict[str, Arrays]]) -> None:
        kind, count, fields = state
        self.rows = [object.__new__(kind) for _ in range(count)]
        for name, arrays in fields.items():
            for row, value in zip(self.rows, split(arrays), strict=True):
                vars(row)[name] = value
