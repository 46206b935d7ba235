"""fp32 log-probs over a split vocabulary against float64."""

import pytest
import torch

from megatron_ext.config import ParallelConfig
from tests.megatron_ext.ranks import run_ranks

VOCAB, TOKENS, TEMPERATURE = 101, 37, 0.7


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, VOCAB, generator=generator) * 8, torch.randint(VOCAB, (TOKENS,), generator=generator)


def split_vocabulary(config: ParallelConfig):
    from megatron_ext import logprobs
    from megatron_ext.mcore import parallel_state

    logprobs.ROWS = 16  # several chunks
    group = parallel_state.get_tensor_model_parallel_group()
    logits, labels = logits_and_labels()
    width = -(-VOCAB // group.size())
    padded = torch.full((TOKENS, width * group.size()), 50.0)  # padding that would win if it were read
    padded[:, :VOCAB] = logits
    mine = padded.chunk(group.size(), 1)[group.rank()].clone().requires_grad_()
    value, entropy = logprobs.vocab_parallel_logprobs(
        mine, labels, vocab_size=VOCAB, group=group, temperature=TEMPERATURE
    )
    (value * torch.arange(TOKENS)).sum().backward()
    assert mine.grad is not None
    return value.detach().numpy(), entropy.numpy(), mine.grad.numpy()


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_logprob_entropy_and_gradient_equal_float64(tensor):
    answers = run_ranks(
        split_vocabulary, ParallelConfig(ranks=tensor, tensor=tensor, sequence=tensor > 1, expert_tensor=1)
    )
    logits, labels = logits_and_labels()
    exact = logits.double().requires_grad_()
    log_softmax = torch.log_softmax(exact / TEMPERATURE, -1)
    expected = log_softmax.gather(1, labels[:, None])[:, 0]
    (expected * torch.arange(TOKENS)).sum().backward()
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    assert exact.grad is not None
    for value, measured_entropy, _ in answers:
        assert torch.allclose(torch.from_numpy(value).double(), expected.detach(), rtol=0, atol=1e-5)
        assert torch.allclose(torch.from_numpy(measured_entropy).double(), entropy.detach(), rtol=0, atol=1e-5)
    gradient = torch.cat([torch.from_numpy(g) for _, _, g in answers], 1)
    assert torch.allclose(gradient[:, :VOCAB].double(), exact.grad, rtol=0, atol=1e-4)
    assert (gradient[:, VOCAB:] == 0).all()
