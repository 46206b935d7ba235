"""A checksum of a tensor's bits that may be taken of its pieces: those of pieces add up to the whole's.

    sum over elements i of bits_i * w(i), modulo 2^64

with w(i) an odd number that a hash makes of the element's place i in row-major order. So one changed element always
changes it, and moved elements do but for chance (2^-64). CPU and GPU give the same number.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 22}  # elements: what a core's cache holds, and 100 MB of temporaries
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MODULUS = 1 << 64


def checksum(tensor: Tensor, covered: Tensor | None = None) -> int:
    """0 <= checksum < 2^64 of a tensor of any shape and dtype.

    covered: bool of the same shape: only these elements, at their places in the whole.
    """
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.dtype.itemsize])
    mask = None if covered is None else covered.reshape(-1)
    total, step = 0, _BLOCK[tensor.device.type]
    for start in range(0, bits.numel(), step):
        block = bits[start : start + step].to(torch.int64)
        if mask is not None:
            block *= mask[start : start + step]
        total += int((block * _weights(start, block.numel(), block.device)).sum())
    return total % MODULUS


def _weights(start: int, count: int, device: torch.device) -> Tensor:
    """[count] int64, odd: a multiplicative hash of start, start + 1, ... (Steele et al., SplitMix64's first round)."""
    place = torch.arange(start + 1, start + 1 + count, dtype=torch.int64, device=device)
    place *= -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    place ^= place >> 30
    place *= -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    place ^= place >> 27
    return place | 1
