"""Step (a) of the first acceptance on a GPU: what needs no model."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import kernels

pytestmark = pytest.mark.gpu
VOCABULARY = 151_936  # Qwen3's

# Nats, nats, and parts of the largest gradient. A bf16 gradient is rounded once, by 2^-9 of itself.
BOUNDS = {
    torch.float32: kernels.HeadErrors(1e-4, 1e-4, 1e-4, 1e-4),
    torch.bfloat16: kernels.HeadErrors(1e-4, 1e-4, 0.01, 0.01),
}


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "fp32_accumulate")],
    ids=str,
)
def test_the_fused_log_prob_is_the_matmuls(dtype, head):
    errors = kernels.fused_logprobs("cuda", tokens=700, vocab=VOCABULARY, hidden=2048, dtype=dtype, head=head)
    print(errors)
    assert all(e <= bound for e, bound in zip(errors, BOUNDS[dtype], strict=True)), errors


@pytest.mark.parametrize(("hidden", "vocab"), [(576, 49_152), (4096, 18_992), (7168, 129_280)], ids=str)
def test_the_fused_log_prob_is_right_at_every_size_of_its_blocks(hidden, vocab):
    """See triton_kernels.blocks_for."""
    errors = kernels.fused_logprobs(
        "cuda", tokens=700, vocab=vocab, hidden=hidden, dtype=torch.bfloat16, head="fp32_accumulate"
    )
    print(errors)
    assert all(e <= bound for e, bound in zip(errors, BOUNDS[torch.bfloat16], strict=True)), errors


def test_rounded_logits_are_off_by_their_rounding_only():
    errors = kernels.fused_logprobs(
        "cuda", tokens=700, vocab=VOCABULARY, hidden=2048, dtype=torch.bfloat16, head="bf16"
    )
    print(errors)
    # Half a step of bfloat16 below 16 is 0.03, at the label and in the sum. An entropy moves by it times log p + H.
    assert errors.logprob < 0.06
    assert errors.entropy < 0.2


def test_a_router_takes_the_experts_that_it_is_given():
    kernels.replayed_selection("cuda", tokens=16_384, experts=128, topk=8)
    kernels.replayed_selection("cuda", tokens=16_384, experts=384, topk=8)


def test_sequences_are_packed_and_come_back():
    kernels.packed_and_back("cuda", sequences=256, longest=4096)
