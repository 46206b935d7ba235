"""Norms and gated activations of float32 rows on a CPU, by the loops of `row_loops.py`, with their gradients.

Whatever is not float32, or not on a CPU, is torch's and Megatron-Core's own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WORTH_THREADS = 2**19  # numbers over which a loop takes about as long as a thread to begin


@functools.cache
def loops() -> ModuleType:
    """Compiled the first time, which is no time for who imports this."""
    from megatron_ext.cpu import row_loops

    return row_loops


def plain(*tensors: Tensor) -> bool:
    """Whether the loops compute with these."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def array(t: Tensor) -> np.ndarray:
    """Its numbers, one after another."""
    return t.detach().contiguous().numpy()


def _own(weight: Tensor) -> np.ndarray:
    """A copy: memory that numpy has seen cannot be given away any more (`host_copy.py`), and weights are."""
    return weight.detach().clone().numpy()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "sameroute rows")


def on_threads(work: Callable[[slice], Any], rows: int, numbers: int) -> list[Any]:
    """work of all rows, dealt to torch's threads where there are numbers enough. Its results, in order."""
    threads = min(torch.get_num_threads(), rows, 1 + numbers // _WORTH_THREADS)
    if threads <= 1:
        return [work(slice(0, rows))]
    ends = [rows * n // threads for n in range(threads + 1)]
    first, *others = [slice(a, b) for a, b in itertools.pairwise(ends)]
    asked = [_pool(torch.get_num_threads() - 1).submit(work, other) for other in others]
    return [work(first), *(each.result() for each in asked)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        rows, out = array(x).reshape(-1, x.shape[-1]), torch.empty(x.shape)
        factors, target, own = torch.empty(len(rows)), array(out).reshape(rows.shape), _own(weight)
        into = factors.numpy()
        on_threads(lambda s: loops().rms_norm_rows(rows[s], own, np.float32(epsilon), target[s], into[s]), *_size(rows))
        ctx.save_for_backward(x, weight, factors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, weight, factors = ctx.saved_tensors
        of_x = torch.empty(x.shape)
        given, rows, into = (array(t).reshape(-1, x.shape[-1]) for t in (grads[0], x, of_x))
        own, scale = _own(weight), factors.numpy()

        def part(s: slice) -> np.ndarray:
            total = np.zeros(len(own))
            loops().rms_norm_gradients(given[s], rows[s], own, scale[s], into[s], total)
            return total

        of_weight = sum(on_threads(part, *_size(rows)))
        return of_x, torch.from_numpy(of_weight.astype(np.float32)), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis."""
    if not plain(x, weight):
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factors):
        width = x.shape[1] // 2
        sigmoid, out = torch.sigmoid(x[:, :width]), x.new_empty(len(x), width)
        rows, gates, target = array(x), array(sigmoid), out.numpy()
        each = np.ones(len(x), np.float32) if factors is None else array(factors).reshape(-1)
        on_threads(lambda s: loops().swiglu_rows(rows[s], gates[s], each[s], target[s]), *_size(rows))
        ctx.save_for_backward(x, sigmoid, factors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, sigmoid, factors = ctx.saved_tensors
        of_x, of_factors = torch.empty(x.shape), torch.empty(len(x))
        given, rows, gates, into, sums = (array(t) for t in (grads[0], x, sigmoid, of_x, of_factors))
        each = np.ones(len(x), np.float32) if factors is None else array(factors).reshape(-1)
        on_threads(
            lambda s: loops().swiglu_gradients(given[s], rows[s], gates[s], each[s], into[s], sums[s]), *_size(rows)
        )
        return of_x, None if factors is None else of_factors.view(factors.shape)


def swiglu(x: Tensor, factors: Tensor | None) -> Tensor:
    """silu(gate) * up * factors. x: [rows, 2 f] float32 on a CPU, gate and up; factors: [rows, 1], or None."""
    return _SwiGLU.apply(x, factors)  # pyright: ignore[reportReturnType]


def _size(rows: np.ndarray) -> tuple[int, int]:
    return len(rows), rows.size


def install() -> None:
    """In place of Megatron-Core's (0.19.2) fused activations, where a model asks for these."""
    import megatron.core.transformer.mlp as mlp
    from megatron.core.transformer.moe import experts, shared_experts

    def replaced(original: Callable[..., Tensor], *, weighted: bool) -> Callable[..., Tensor]:
        def activation(x: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
            factors = more[0] if weighted else None
            if bias is not None or any(more[weighted:]) or not plain(x, *([] if factors is None else [factors])):
                return original(x, bias, *more)
            return swiglu(x.flatten(0, -2), factors).view(*x.shape[:-1], x.shape[-1] // 2)

        return activation

    plain_one, weighted_one = mlp.bias_swiglu_impl, mlp.weighted_bias_swiglu_impl
    mlp.bias_swiglu_impl = shared_experts.bias_swiglu_impl = replaced(plain_one, weighted=False)
    mlp.weighted_bias_swiglu_impl = experts.weighted_bias_swiglu_impl = replaced(weighted_one, weighted=True)
