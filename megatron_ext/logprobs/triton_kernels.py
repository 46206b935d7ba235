"""A tile of the vocabulary in Triton: matmul and softmax statistics, or matmul and gradient, in one kernel.

A program owns a block of tokens x columns. It accumulates the block's logits in float32 registers over the hidden size
and reduces them there. Forward writes four numbers a token and column block; backward writes the gradient of the logits
in bf16, for a bounded number of columns, and leaves its two matmuls to cuBLAS. Backward recomputes the logits, so it
does three matmuls; a head that keeps [tokens, vocabulary] in memory does two.

Blocks and pipeline depth are chosen for an H100 (wgmma, operands through TMA), by the size of the model: see
`blocks_for`. The kernels compile for it, without spills, and agree with float64 in Triton's interpreter; they have not
been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ext.logprobs.tiles import FLOOR, RowGradients, RowStats, TorchTiles


class Blocks(NamedTuple):
    """Shape of a program: tokens, columns, bytes of the hidden size a step, token blocks that share columns in L2.
    registers: a thread has at most; 0: whatever the compiler takes."""

    tokens: int
    columns: int
    depth_bytes: int
    group: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def shared_bytes(self) -> int:
        """Of shared memory that the operands on their way take; barriers and reductions take some KiB more."""
        return self.stages * (self.tokens + self.columns) * self.depth_bytes


LARGE = Blocks(tokens=128, columns=256, depth_bytes=128, group=8, warps=8, stages=4)  # 192 KiB: one program a processor
MIDDLE = Blocks(tokens=128, columns=128, depth_bytes=128, group=8, warps=8, stages=3, registers=128)  # 96 KiB: two
SMALL = Blocks(tokens=128, columns=128, depth_bytes=64, group=8, warps=8, stages=3)  # 48 KiB: for any GPU
SHARED = 227 * 1024  # bytes that the programs of a processor share, compute capability 9 and 10
_DEEP, _WIDE = 2048, 8192  # from here on LARGE


def blocks_for(device: torch.device, hidden: int, columns: int) -> Blocks:
    """By compute capability, hidden size and columns of the vocabulary on this rank.

    A program multiplies over the hidden size, then reduces. With a small hidden size the second part is as long as the
    first: two programs a processor let one multiply while the other reduces. With few columns LARGE would leave
    processors without a program. Nothing is tuned at run time, and the number of tokens does not count, so that a
    token's sums are made in one order whatever stands beside it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return SMALL
    return LARGE if hidden >= _DEEP and columns >= _WIDE else MIDDLE


@dataclass(frozen=True)
class TritonTiles(TorchTiles):
    """`TorchTiles` by the kernels below. A row of hidden states or weights must be a multiple of 16 bytes. columns: of
    this rank, all tiles together; 0: a tile is all."""

    STATS_OF_ANY_WIDTH: ClassVar[bool] = True
    HAS_SCORES: ClassVar[bool] = False

    columns: int = 0

    def stats(
        self, x: Tensor, w: Tensor, labels: Tensor, kept: Tensor | None, left: list[Tensor] | None = None
    ) -> RowStats:
        assert left is None
        tokens, columns = len(x), len(w)
        blocks = blocks_for(x.device, x.shape[1], self.columns or columns)
        across = triton.cdiv(columns, blocks.columns)
        parts = torch.empty(3, across, tokens, device=x.device)
        target = torch.zeros(tokens, device=x.device)
        stats_kernel[(triton.cdiv(tokens, blocks.tokens) * across,)](
            *_operands(x, w, blocks), labels, kept, parts, target,
            tokens, columns, x.shape[1], 0 if kept is None else kept.stride(0), 1 / self.temperature,
            **self._options(x, blocks),
        )  # fmt: skip
        peak = parts[0].amax(0)
        _, total, weighted, _ = RowStats(parts[0], parts[1], parts[2], target).under(peak)
        return RowStats(peak, total.sum(0), weighted.sum(0), target)

    def gradient(
        self,
        x: Tensor,
        w: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        given: RowGradients,
        left: Tensor | None = None,
    ) -> Tensor:
        assert left is None
        tokens, columns = len(x), len(w)
        blocks = blocks_for(x.device, x.shape[1], self.columns or columns)
        out = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
        given = RowGradients(*(None if g is None else g.contiguous() for g in given))
        gradient_kernel[(triton.cdiv(tokens, blocks.tokens) * triton.cdiv(columns, blocks.columns),)](
            *_operands(x, w, blocks), labels, kept, given.lse, given.entropy, given.of_logprob, given.of_entropy, out,
            tokens, columns, x.shape[1], 0 if kept is None else kept.stride(0), 1 / self.temperature,
            **self._options(x, blocks),
        )  # fmt: skip
        return out

    def _options(self, x: Tensor, blocks: Blocks) -> dict:
        # The interpreter multiplies bf16 as if it were integers (3.8); float32 holds its products exactly.
        operand = tl.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else tl.float32
        return {
            "FLOOR": FLOOR, "ROUNDS": self.rounds, "OPERAND": operand, "TOKENS": blocks.tokens,
            "COLUMNS": blocks.columns, "DEPTH": blocks.depth_bytes // x.element_size(), "GROUP": blocks.group,
            "num_warps": blocks.warps, "num_stages": blocks.stages,
            **({"maxnreg": blocks.registers} if blocks.registers else {}),
        }  # fmt: skip


def _operands(x: Tensor, w: Tensor, blocks: Blocks) -> tuple[TensorDescriptor, TensorDescriptor]:
    if x.shape[1] * x.element_size() % 16:
        raise ValueError(f'hidden size {x.shape[1]} in {x.dtype} is no multiple of 16 bytes; pass kernel="torch"')
    depth = blocks.depth_bytes // x.element_size()
    return (
        TensorDescriptor.from_tensor(x.contiguous(), [blocks.tokens, depth]),
        TensorDescriptor.from_tensor(w.contiguous(), [blocks.columns, depth]),
    )


@triton.jit
def _place(tokens, columns, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The block of this program: GROUP token blocks, then the next columns, so that both operands stay in L2."""
    down, across = tl.cdiv(tokens, TOKENS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def _scores(
    hidden, weight, kept, row, column, tokens, columns, depth, kept_stride, inverse_temperature,
    FLOOR: tl.constexpr, ROUNDS: tl.constexpr, OPERAND: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[TOKENS, COLUMNS] logits / T; FLOOR where there is no token of the kept set."""
    logits = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in range(0, depth, DEPTH):
        x = hidden.load([row * TOKENS, k]).to(OPERAND)
        w = weight.load([column * COLUMNS, k]).to(OPERAND)
        logits = tl.dot(x, w.T, logits, input_precision="ieee")
    if ROUNDS:
        logits = logits.to(tl.bfloat16).to(tl.float32)
    rows = row * TOKENS + tl.arange(0, TOKENS)
    cols = column * COLUMNS + tl.arange(0, COLUMNS)
    keep = (cols < columns)[None, :]
    if kept is not None:
        words = column * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
        real = (rows < tokens)[:, None] & (words < tl.cdiv(columns, 32))[None, :]
        bits = tl.load(kept + rows[:, None] * kept_stride + words[None, :], mask=real, other=0)
        bits = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        keep = keep & (tl.reshape(bits, (TOKENS, COLUMNS)) != 0)
    return tl.where(keep, logits * inverse_temperature, FLOOR), rows, cols


@triton.jit
def stats_kernel(
    hidden, weight, labels, kept, parts, target,
    tokens, columns, depth, kept_stride, inverse_temperature,
    FLOOR: tl.constexpr, ROUNDS: tl.constexpr, OPERAND: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """parts: [3, column blocks, tokens], peak, total and weighted of each block. target: [tokens]. See `RowStats`."""
    row, column = _place(tokens, columns, TOKENS, COLUMNS, GROUP)
    x, rows, _ = _scores(
        hidden, weight, kept, row, column, tokens, columns, depth, kept_stride, inverse_temperature,
        FLOOR, ROUNDS, OPERAND, TOKENS, COLUMNS, DEPTH,
    )  # fmt: skip
    real = rows < tokens
    label = tl.load(labels + rows, mask=real, other=-1).to(tl.int32) - column * COLUMNS
    picked = tl.sum(tl.where(label[:, None] == tl.arange(0, COLUMNS)[None, :], x, 0.0), 1)
    inside = (label >= 0) & (label < COLUMNS) & (label + column * COLUMNS < columns)
    tl.store(target + rows, picked, mask=real & inside)
    peak = tl.max(x, 1)
    x = x - peak[:, None]
    weights = tl.exp(x)
    across = tl.cdiv(columns, COLUMNS)
    at = parts + column * tokens + rows
    tl.store(at, peak, mask=real)
    tl.store(at + across * tokens, tl.sum(weights, 1), mask=real)
    tl.store(at + 2 * across * tokens, tl.sum(weights * x, 1), mask=real)


@triton.jit
def gradient_kernel(
    hidden, weight, labels, kept, lse, entropy, of_logprob, of_entropy, out,
    tokens, columns, depth, kept_stride, inverse_temperature,
    FLOOR: tl.constexpr, ROUNDS: tl.constexpr, OPERAND: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out: [tokens, columns], the gradient of the logits before T."""
    row, column = _place(tokens, columns, TOKENS, COLUMNS, GROUP)
    x, rows, cols = _scores(
        hidden, weight, kept, row, column, tokens, columns, depth, kept_stride, inverse_temperature,
        FLOOR, ROUNDS, OPERAND, TOKENS, COLUMNS, DEPTH,
    )  # fmt: skip
    real = rows < tokens
    label = tl.load(labels + rows, mask=real, other=-1).to(tl.int32) - column * COLUMNS
    scale = tl.load(of_logprob + rows, mask=real, other=0.0) * inverse_temperature
    log_p = x - tl.load(lse + rows, mask=real, other=0.0)[:, None]
    p = tl.exp(log_p)
    one = label[:, None] == tl.arange(0, COLUMNS)[None, :]
    gradient = tl.where(one, scale[:, None], 0.0) - p * scale[:, None]
    if of_entropy is not None:
        scale_entropy = tl.load(of_entropy + rows, mask=real, other=0.0) * inverse_temperature
        h = tl.load(entropy + rows, mask=real, other=0.0)
        gradient -= p * (log_p + h[:, None]) * scale_entropy[:, None]
    at = out + rows[:, None] * columns + cols[None, :]
    tl.store(at, gradient.to(out.dtype.element_ty), mask=real[:, None] & (cols < columns)[None, :])
