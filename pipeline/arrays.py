"""Rows of different lengths as one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [N] of different lengths as one matrix [rows, longest], zeros (False) behind."""
    out = np.zeros((len(rows), max(len(r) for r in rows)), rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def stack_kept(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Kept sets [n, K] of several widths, one behind the other: [sum n, widest K] int32, -1 behind each."""
    out = np.full((sum(len(p) for p in parts), max(p.shape[1] for p in parts)), -1, np.int32)
    row = 0
    for part in parts:
        out[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return out
