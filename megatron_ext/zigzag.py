"""How context parallelism deals the tokens of a sequence to its ranks."""

from __future__ import annotations

import numpy as np


def zigzag_positions(length: int, cp_size: int, cp_rank: int) -> np.ndarray:
    """Positions of an n-token sequence that a context-parallel rank holds: chunks r and 2*cp-1-r of 2*cp, so that
    causal attention costs every rank the same. [length / cp_size] int64."""
    if cp_size == 1:
        return np.arange(length)
    if length % (2 * cp_size):
        raise ValueError(f"a sequence of {length} tokens does not divide into {2 * cp_size} zigzag chunks")
    chunks = np.arange(length).reshape(2 * cp_size, -1)
    return np.concatenate([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
