"""Log-probs of named tokens against a whole softmax, values and gradients."""

import pytest
import torch

from megatron_ext.logprobs.linear import linear_logprobs
from megatron_ext.logprobs.named_tokens import named_logprobs


@pytest.mark.parametrize("head", ["fp32", "fp32_accumulate"])
def test_values_and_gradients_are_those_of_the_whole_softmax(head):
    torch.manual_seed(0)
    dtype = torch.float32 if head == "fp32" else torch.bfloat16
    hidden, weight = torch.randn(9, 16).to(dtype), torch.randn(40, 16).to(dtype)
    labels, named = torch.randint(0, 40, (9,)), torch.randint(0, 40, (9, 4))
    named[3, 2], named[5, 0] = -1, labels[5]
    pull = torch.randn(9, 5) * (torch.cat([labels[:, None], named], 1) >= 0)

    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    own, _ = linear_logprobs(h, w, labels, vocab_size=40, temperature=0.7, head=head)
    found = named_logprobs(own, h, w, labels, named, group=None, temperature=0.7, head=head)
    (torch.cat([own[:, None], found], 1) * pull).sum().backward()

    x, y = (t.double().requires_grad_() for t in (hidden, weight))
    table = torch.log_softmax(x @ y.t() / 0.7, -1)
    expected = table.gather(1, torch.cat([labels[:, None], named.clamp(min=0)], 1))
    (expected * pull).sum().backward()
    read = named >= 0
    loose = 1e-5 if head == "fp32" else 0.1  # of gradients that bfloat16 holds
    torch.testing.assert_close(found[read].double(), expected[:, 1:][read], rtol=0, atol=1e-5)
    assert found[5, 0] == own[5]
    for mine, theirs in ((h.grad, x.grad), (w.grad, y.grad)):
        assert mine is not None
        torch.testing.assert_close(mine.double(), theirs, rtol=loose, atol=loose)
