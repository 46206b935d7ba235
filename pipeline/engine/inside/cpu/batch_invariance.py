"""Deterministic inference on the CPU: what a row becomes does not depend on the rows beside it.

SGLang's own mode replaces matrix products by Triton kernels, which need a GPU. On the CPU everything else on the path
works a row at a time, and torch's matrix products give a row the same bits whatever the number of rows, as long as
there are a few: below that the library takes another kernel (one to three rows in float32, seen with AVX-512 and
torch 2.14). So fewer rows are padded.
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
        if len(a) >= FEWEST_ROWS:
            return mm(a, b, out=out)
        result = padded(lambda rows: mm(rows, b), a)
        return result if out is None else out.copy_(result)

    padded_linear.pads = True  # pyright: ignore[reportFunctionMemberAccess]
    F.linear, torch.matmul, torch.mm = padded_linear, padded_matmul, padded_mm


def padded(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) for x [..., in], computed with FEWEST_ROWS rows or more."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows >= FEWEST_ROWS or rows == 0:
        return product(x)
    wide = x.new_zeros(FEWEST_ROWS, x.shape[-1])
    wide[:rows] = x.reshape(rows, x.shape[-1])
    result = product(wide)[:rows]
    return result.reshape(*x.shape[:-1], result.shape[-1])
