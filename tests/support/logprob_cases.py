"""A small LM head with every trap, and what float64 says of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOKENS, VOCAB, PADDED, HIDDEN, KEPT = 37, 301, 320, 48, 40
PADDING = 9.0  # of the rows that pad the vocabulary: they would win if they were read


class Case(NamedTuple):
    """Inputs of `linear_logprobs` for the whole vocabulary, and how much the loss weighs its two results."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    kept: Tensor
    of_logprob: Tensor
    of_entropy: Tensor


class Answer(NamedTuple):
    """logprobs and entropy [tokens], and the gradients of sum(of_logprob * logprobs + of_entropy * entropy)."""

    logprobs: Tensor
    entropy: Tensor
    of_hidden: Tensor
    of_weight: Tensor

    def errors(self, other: Answer) -> list[float]:
        """Largest absolute differences."""
        return [float((a.double() - b.double()).abs().max()) for a, b in zip(self, other, strict=True)]


def case() -> Case:
    """Logits of standard deviation 5. Every fifth token has no kept set; the others keep 1 to KEPT ids."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.full((PADDED, HIDDEN), PADDING)
    weight[:VOCAB] = 0.7 * torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    kept = torch.full((TOKENS, KEPT), -1)
    for token in range(TOKENS):
        if token % 5:
            ids = torch.randperm(VOCAB, generator=generator)[: 1 + token]
            kept[token, : len(ids)] = ids
            if labels[token] not in ids:
                kept[token, token // 2] = labels[token]
    hidden, *weights = torch.randn(HIDDEN + 2, TOKENS, generator=generator).split([HIDDEN, 1, 1])
    return Case(hidden.t().contiguous(), weight, labels, kept, weights[0][0], weights[1][0])


def exact(c: Case, *, temperature: float, kept: bool) -> Answer:
    """In float64, with the whole table of logits."""
    hidden, weight = c.hidden.double().requires_grad_(), c.weight.double().requires_grad_()
    scores = hidden @ weight[:VOCAB].t() / temperature
    if kept:
        keep = torch.zeros(TOKENS, VOCAB + 1, dtype=torch.bool)
        keep.scatter_(1, torch.where(c.kept < 0, VOCAB, c.kept), True)
        keep = keep[:, :VOCAB] | (c.kept < 0).all(1, keepdim=True)
        scores = scores.masked_fill(~keep, -1e300)
    log_p = scores.log_softmax(1)
    return differentiate(
        log_p.gather(1, c.labels[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(1),
        hidden,
        weight,
        c.of_logprob,
        c.of_entropy,
    )


def differentiate(
    logprobs: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor, of_logprob: Tensor, of_entropy: Tensor | None
) -> Answer:
    """Backward through both results, or through the log-probs alone."""
    loss = (logprobs * of_logprob).sum()
    if of_entropy is not None:
        loss = loss + (entropy * of_entropy).sum()
    return Answer(logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight)))
