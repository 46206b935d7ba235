"""Deterministic inference on the CPU: what a row becomes does not depend on the rows beside it.

SGLang's own mode replaces matrix products by Triton kernels, which need a GPU. On the CPU everything else on the path
works a row at a time, and torch's matrix products give a row the same bits whatever the number of rows, as long as
there are a few: below that the library takes another kernel (one to three rows in float32, seen with AVX-512 and
torch 2.14). So fewer rows are padded. In bfloat16 a processor with AMX sums a row of 63 in another order than the same
row of 130 (widths from 512, seen with torch 2.14): there all products are of FEWEST_ROWS rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 16


def install() -> None:
    """Pad in this process. In place of `sglang.srt.batch_invariant_ops.enable_batch_invariant_mode`."""
    if getattr(F.linear, "pads", False):
        return
    linear, matmul, mm = F.linear, torch.matmul, torch.mm

    def padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return padded(lambda rows: linear(rows, weight, bias), x)

    def padded_matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        if b.dim() != 2:
            return matmul(a, b, out=out)
        result = padded(lambda rows: matmul(rows, b), a)
        return result if out is None else out.copy_(result)

    def padded_mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        result = padded(lambda rows: mm(rows, b), a)
        return result if out is None else out.copy_(result)

    padded_linear.pads = True  # pyright: ignore[reportFunctionMemberAccess]
    F.linear, torch.matmul, torch.mm = padded_linear, padded_matmul, padded_mm


def padded(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) for x [..., in], computed with FEWEST_ROWS rows or more; in bfloat16 with FEWEST_ROWS at a time."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    blocks = x.dtype == torch.bfloat16
    if rows == 0 or (rows >= FEWEST_ROWS and not blocks):
        return product(x)
    wide = x.new_zeros(-(-rows // FEWEST_ROWS) * FEWEST_ROWS, x.shape[-1])
    wide[:rows] = x.reshape(rows, x.shape[-1])
    result = torch.cat([product(block) for block in wide.split(FEWEST_ROWS)])[:rows]
    return result.reshape(*x.shape[:-1], result.shape[-1])
