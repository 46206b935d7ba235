"""Parts of an adapter by themselves."""

import torch

from megatron_ext.lora.adapter import grouped_linear


def test_torchs_grouped_kernel_multiplies_as_one_group_after_another():
    """bfloat16 is what it is for; a group may have no tokens."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 32, generator=draw).bfloat16()
    weights = torch.randn(3, 16, 32, generator=draw).bfloat16()
    onto = torch.randn(9, 16, generator=draw).bfloat16()
    found = []
    for kernel in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, weights)]
        out = grouped_linear(*inputs, [4, 0, 5], kernel=kernel)
        out.backward(onto)
        found.append([out.detach(), *(t.grad for t in inputs)])
    for mine, theirs in zip(*found, strict=True):
        assert (mine.float() - theirs.float()).abs().max() <= 2**-7 * theirs.float().abs().max()
    assert found[0][2][1].abs().max() == 0


def test_where_no_token_wants_any_expert_of_a_rank_their_adapters_have_gradients_of_0():
    """Its other ranks wait in the same backward pass."""
    x = torch.empty(0, 32, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(3, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    out = grouped_linear(x, weights, [0, 0, 0], kernel=True)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() == 0


def test_on_the_cpu_and_of_other_dtypes_no_kernel_is_taken(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.grouped_mm", None)
    assert grouped_linear(torch.ones(2, 4), torch.ones(1, 3, 4), [2]).tolist() == [[4.0] * 3] * 2
