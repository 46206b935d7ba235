"""What tensors of a device are held against: the same numbers by another way. Each function takes the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class HeadErrors(NamedTuple):
    """Of the fused log-prob head against a matmul in float64: nats, and gradients relative to their largest entry."""

    logprob: float
    entropy: float
    of_hidden: float
    of_weight: float


def fused_logprobs(device: str, *, tokens: int, vocab: int, hidden: int, dtype: torch.dtype, head: Any) -> HeadErrors:
    """Logits of standard deviation 3; weights padded by 64 rows that would win if they were read."""
    from megatron_ext.logprobs.linear import linear_logprobs

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab + 64, hidden, generator=generator) * (3 / hidden**0.5)
    weight[vocab:] = 9.0
    states = torch.randn(tokens, hidden, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator).to(device)
    of_logprob, of_entropy = torch.randn(2, tokens, generator=generator).to(device)
    x, w = (t.to(device, dtype).requires_grad_() for t in (states, weight))
    logprobs, entropy = linear_logprobs(x, w, labels, vocab_size=vocab, head=head)
    (logprobs * of_logprob + entropy * of_entropy).sum().backward()

    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    table = torch.log_softmax(x64 @ w64[:vocab].t(), -1)
    exact, exact_entropy = table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (exact * of_logprob + exact_entropy * of_entropy).sum().backward()

    def error(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> float:
        return float((a.double() - b).abs().max() / scale)

    assert x.grad is not None and w.grad is not None and x64.grad is not None and w64.grad is not None  # noqa: PT018
    return HeadErrors(
        error(logprobs, exact),
        error(entropy, exact_entropy),
        error(x.grad, x64.grad, float(x64.grad.abs().max())),
        error(w.grad, w64.grad, float(w64.grad.abs().max())),
    )


def replayed_selection(device: str, *, tokens: int, experts: int, topk: int) -> None:
    """A router takes the experts it is given and its own scores of them; rows without any are native, and counted."""
    from megatron_ext.batch.replay import LayerReplay
    from megatron_ext.mcore import RouterReplayAction

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator)
    native = scores.topk(topk).indices
    given = torch.rand(tokens, experts, generator=generator).topk(topk).indices
    agreeing, missing = torch.arange(tokens) % 3 == 0, torch.arange(tokens) % 5 == 0
    given[agreeing] = native[agreeing].flip(-1)  # the same experts in another order
    expected = torch.where(missing[:, None], native, given)
    given[missing] = -1

    replay = LayerReplay()
    replay.layer_number = 1
    replay.counted = torch.ones(tokens, dtype=torch.bool, device=device)
    replay.router_replay_action = RouterReplayAction.REPLAY_FORWARD
    replay.target_topk_idx = given.to(device)
    live = scores.to(device).requires_grad_()
    chosen, selection = replay.get_replay_topk(live, topk, default_compute_topk=lambda s, k, **_: tuple(s.topk(k)))
    assert torch.equal(selection.cpu(), expected)
    assert torch.equal(chosen.detach().cpu(), scores.gather(1, expected))
    chosen.sum().backward()
    assert live.grad is not None
    assert torch.equal(live.grad.cpu(), torch.zeros(tokens, experts).scatter(1, expected, 1.0))
    assert replay.counts.tolist() == [
        int((~missing).sum()),
        int((~missing & agreeing).sum()),
        int(missing.sum()),
        0,
    ]


def packed_and_back(device: str, *, sequences: int, longest: int) -> None:
    """Sequences packed into one row of the device, and their responses out of it again."""
    from megatron_ext.batch.layout import Sample, TokenLayout
    from megatron_ext.batch.micro_batch import make_micro_batch

    generator = np.random.default_rng(0)
    samples = []
    for _ in range(sequences):
        prompt, response = (int(n) for n in generator.integers(1, longest // 2, 2))
        samples.append(Sample(generator.integers(0, 1 << 20, prompt + response).astype(np.int32), prompt))
    layout = TokenLayout(tuple(s.input_length for s in samples), align=16)
    batch = make_micro_batch(range(sequences), samples, layout, torch.device(device), None)
    assert batch.tokens.device.type == batch.labels.device.type == torch.device(device).type
    assert batch.tokens.numel() % 16 == 0
    matrix = layout.responses(batch.labels, [s.response_length for s in samples]).cpu().numpy()
    for row, sample in zip(matrix, samples, strict=True):
        assert np.array_equal(row[: sample.response_length], sample.tokens[sample.prompt_length :])
        assert not row[sample.response_length :].any()
    inputs = np.concatenate([batch.tokens.cpu().numpy()[0][a : a + n] for a, n in zip(layout.starts, layout.lengths)])  # noqa: B905
    assert np.array_equal(inputs, np.concatenate([s.tokens[:-1] for s in samples]))
