"""Norms and gated activations in one pass equal float64's, value and gradient, on any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.config import ParallelConfig
from megatron_ext.cpu import row_functions as rows
from tests.support.ranks import run_ranks


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request, monkeypatch):
    """So many, each with a share of the rows."""
    monkeypatch.setattr(rows, "_WORTH_THREADS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs)


def error(mine: Tensor, true: Tensor) -> float:
    """Against the largest number."""
    return float((mine.detach().double() - true.detach()).abs().max() / true.detach().abs().max())


@pytest.mark.parametrize("shape", [(200, 64), (7, 5, 4, 32), (1, 576)], ids=str)
def test_the_norm_equals_float64(threads, shape):
    x, weight = (3 * torch.randn(s) + 0.5 for s in (shape, shape[-1:]))
    mine, true = ([t.to(dtype).requires_grad_() for t in (x, weight)] for dtype in (torch.float32, torch.float64))
    ours, theirs = rows.rms_norm(*mine, 1e-3), F.rms_norm(true[0], shape[-1:], true[1], 1e-3)
    assert error(ours, theirs) < 1e-6
    for a, b in zip(gradients(ours, *mine), gradients(theirs, *true), strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gated_activation_equals_float64(threads, weighted):
    x, factors = 3 * torch.randn(130, 96), torch.rand(130, 1)
    mine, true = ([t.to(dtype).requires_grad_() for t in (x, factors)] for dtype in (torch.float32, torch.float64))
    gate, up = true[0].chunk(2, 1)
    ours = rows.swiglu(mine[0], mine[1] if weighted else None)
    theirs = F.silu(gate) * up * (true[1] if weighted else 1)
    assert error(ours, theirs) < 1e-6
    count = 1 + weighted
    for a, b in zip(gradients(ours, *mine[:count]), gradients(theirs, *true[:count]), strict=True):
        assert error(a, b) < 1e-6


def test_a_share_of_the_rows_is_computed_alike(threads):
    """What a row becomes depends on no row beside it."""
    x, weight = torch.randn(50, 64), torch.randn(64)
    assert torch.equal(rows.rms_norm(x, weight, 1e-6)[13:21], rows.rms_norm(x[13:21], weight, 1e-6))
    assert torch.equal(rows.swiglu(x, None)[13:21], rows.swiglu(x[13:21], None))


def test_no_row_is_no_error(threads):
    x, weight = torch.empty(0, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    of_x, of_weight = gradients(rows.rms_norm(x, weight, 1e-6), x, weight)
    assert of_x.shape == (0, 64)
    assert not of_weight.any()
    assert gradients(rows.swiglu(x, None), x)[0].shape == (0, 64)


def test_what_is_not_float32_is_torchs():
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(rows.rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))


def test_a_weight_that_is_centred_at_zero_learns():
    x, weight = torch.randn(9, 32), torch.randn(32, requires_grad=True)
    (mine,) = gradients(rows.rms_norm(x, 1.0 + weight, 1e-6), weight)
    (true,) = gradients(F.rms_norm(x.double(), (32,), 1 + weight.double(), 1e-6), weight)
    assert error(mine, true.double()) < 1e-6


def activations_of_megatron(_: ParallelConfig) -> list[bool]:
    """On a rank: which of its fused activations are these."""
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import experts, shared_experts

    def is_ours(out: Tensor) -> bool:
        nodes = [out.grad_fn]
        for node in nodes:
            nodes += [after for after, _ in node.next_functions if after is not None]
        return "_SwiGLUBackward" in [node.name() for node in nodes]

    x, factors = torch.randn(3, 5, 64, requires_grad=True), torch.rand(15, 1)
    none = torch.empty(0, 64, requires_grad=True)  # what experts get of which no token wants any
    return [
        is_ours(mlp.bias_swiglu_impl(x, None, False, False)),
        is_ours(shared_experts.bias_swiglu_impl(x, None, False)),
        is_ours(experts.weighted_bias_swiglu_impl(x.flatten(0, 1), None, factors, False)),
        is_ours(mlp.bias_swiglu_impl(x.bfloat16(), None, False, False)),
        is_ours(experts.weighted_bias_swiglu_impl(x.flatten(0, 1).bfloat16(), None, factors.bfloat16(), False)),
        is_ours(experts.weighted_bias_swiglu_impl(none, None, torch.empty(0, 1), False)),
        is_ours(mlp.bias_swiglu_impl(none.view(0, 1, 64), None, False, False)),
    ]


def test_megatrons_layers_call_them_for_plain_float32_alone():
    (found,) = run_ranks(activations_of_megatron, ParallelConfig())
    assert found == [True, True, True, False, False, True, True]
