"""The gated delta rule and its convolution against their definitions, forward and backward, in packed sequences."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.model import delta_rule
from tests.support import by_delta_rule

LENGTHS = [1, 3, 64, 65, 2, 150]  # shorter than a chunk, a chunk, more than one; 64 and 65 lie in different groups
HEADS, KEY, VALUE = 3, 8, 5


def packed():
    parts = by_delta_rule.random_sequences(LENGTHS, HEADS, KEY, VALUE)
    return parts, torch.tensor([0, *LENGTHS]).cumsum(0)


def by_definition(parts, states=None):
    """(what all sequences say, [tokens, heads, value]; their states)"""
    each = zip(*(t.split(LENGTHS) for t in parts), strict=True)
    said, after = zip(
        *(by_delta_rule.delta_rule(*s, None if states is None else states[i]) for i, s in enumerate(each)), strict=True
    )
    return torch.cat(said), torch.stack(after)


def test_packed_sequences_are_each_their_definition_and_so_are_their_gradients():
    parts, cu = packed()
    ours = [t.clone().requires_grad_() for t in parts]
    theirs = [t.double().requires_grad_() for t in parts]
    out, state = delta_rule.chunk_gated_delta_rule(*(t[None] for t in ours), cu_seqlens=cu)
    expected, _ = by_definition(theirs)
    assert state is None
    assert (out[0] - expected).abs().max() < 1e-5
    weight = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1))
    (out[0] * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5 * max(1.0, float(b.grad.abs().max()))


def test_nothing_of_a_sequence_reaches_another():
    parts, cu = packed()
    before, _ = delta_rule.chunk_gated_delta_rule(*(t[None] for t in parts), cu_seqlens=cu)
    start, end = int(cu[3]), int(cu[4])
    for tensor in parts:
        tensor[start:end] = torch.rand_like(tensor[start:end]).neg()
    after, _ = delta_rule.chunk_gated_delta_rule(*(t[None] for t in parts), cu_seqlens=cu)
    others = torch.ones(len(parts[0]), dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(before[0, others], after[0, others])
    assert not torch.equal(before[0, start:end], after[0, start:end])


def test_rows_without_a_pack_are_sequences():
    parts = [t.unflatten(0, (3, 95)) for t in packed()[0]]
    out, _ = delta_rule.chunk_gated_delta_rule(*parts)
    for row in range(3):
        expected, _ = by_delta_rule.delta_rule(*(t[row] for t in parts))
        assert (out[row] - expected).abs().max() < 1e-5


def test_a_sequence_goes_on_from_its_state():
    parts, cu = packed()
    before = torch.randn(len(LENGTHS), HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(2))
    out, after = delta_rule.chunk_gated_delta_rule(
        *(t[None] for t in parts), initial_state=before, output_final_state=True, cu_seqlens=cu
    )
    expected, state = by_definition(parts, before)
    assert (out[0] - expected).abs().max() < 1e-5
    assert (after - state).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_the_convolution_is_its_definition_in_each_sequence(rows):
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(rows, sum(LENGTHS), 6, generator=draw), torch.randn(6, 4, generator=draw)
    lengths = LENGTHS if rows == 1 else [sum(LENGTHS)]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0) if rows == 1 else None
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [x.double().requires_grad_(), weight.double().requires_grad_()]
    out, _ = delta_rule.causal_conv1d(*ours, None, "silu", cu_seqlens=cu)
    expected = torch.stack(
        [torch.cat([by_delta_rule.convolution(s, theirs[1]) for s in row.split(lengths)]) for row in theirs[0]]
    )
    assert (out - expected).abs().max() < 1e-5
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5 * float(b.grad.abs().max())
