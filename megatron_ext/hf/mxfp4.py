"""MXFP4 weights (OCP Microscaling Formats 1.0, section 5.2): 4-bit floats, 32 of a row with one power of two."""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., rows, groups, 16] uint8, two elements a byte, the first in its low half; [..., rows, groups] uint8,
    exponents plus 127 -> [..., groups * 32, rows] bfloat16, exact, and transposed as plain packed weights are."""
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=torch.bfloat16)
    elements = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], -1).flatten(-2)
    return torch.ldexp(elements, scales[..., None].int() - 127).flatten(-2).transpose(-1, -2)
