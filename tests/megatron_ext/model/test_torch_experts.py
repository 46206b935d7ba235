"""Expert products, and what they leave in Megatron-Core's gradient buffers."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.ranks import run_alone

COUNTS = [3, 0, 7, 1]
IN, OUT = 6, 5


def products(buffered: bool):
    """Outputs and gradients of the products and of torch's own, the same inputs; runs where Megatron-Core may be
    imported. buffered: the weights have buffers that hold something already."""
    from megatron_ext.model.torch_experts import _Products

    found = []
    for own in (True, False):
        torch.manual_seed(0)
        x = torch.randn(sum(COUNTS), IN, dtype=torch.float64, requires_grad=True)
        weights = [torch.nn.Parameter(torch.randn(OUT, IN, dtype=torch.float64)) for _ in COUNTS]
        before = [torch.randn_like(w) for w in weights]
        if own and buffered:
            for weight, buffer in zip(weights, before, strict=True):
                weight.main_grad = buffer.clone()
        if own:
            out = _Products.apply(x, COUNTS, *weights)
        else:
            out = torch.cat([F.linear(part, w) for part, w in zip(x.split(COUNTS), weights, strict=True)])
        (out * torch.randn_like(out)).sum().backward()
        if own and buffered:
            assert all(w.grad is None for w in weights)
            of_weights = [w.main_grad for w in weights]
        else:
            of_weights = [w.grad + (b if buffered else 0) for w, b in zip(weights, before, strict=True)]
        found.append((out.detach(), x.grad, *of_weights))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("buffered", [False, True])
def test_products_and_their_gradients_are_torchs_also_where_an_expert_has_no_token(buffered):
    (largest,) = run_alone(products, buffered)
    assert largest < 1e-12
