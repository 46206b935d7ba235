"""Exact expectations: every sequence of a small tabular policy, in float64.

A policy is a table of logits, one row per prefix. With a vocabulary of V and at most T tokens every sequence can be
written down with its probability, so a bias or a variance is a sum and not an estimate. The tests of the objectives and
the figures of docs/objectives.md both stand on this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.objectives.objective import Objective
from pipeline.objectives.types import Denominators, LossInputs


@dataclass(frozen=True)
class Tree:
    """All M sequences of at most T tokens over V tokens.

    tokens:   [M, T] int64, 0 on padding.
    prefixes: [M, T] int64, the row of the logits that each token is drawn from.
    mask:     [M, T] bool.
    rows:     rows of a policy's logits, [rows, V].
    """

    tokens: Tensor
    prefixes: Tensor
    mask: Tensor
    rows: int
    vocabulary: int

    @property
    def lengths(self) -> Tensor:
        """[M] float64."""
        return self.mask.sum(-1).double()


def tree(vocabulary: int = 3, length: int = 6, stop: bool = True) -> Tree:
    """Every sequence; with `stop`, token 0 ends one, and a sequence that reaches `length` is cut there."""
    rows: dict[tuple[int, ...], int] = {}
    sequences: list[tuple[int, ...]] = []
    pending: list[tuple[int, ...]] = [()]
    while pending:
        prefix = pending.pop()
        rows[prefix] = len(rows)
        for token in range(vocabulary):
            sequence = (*prefix, token)
            ended = len(sequence) == length or (stop and token == 0)
            (sequences if ended else pending).append(sequence)
    tokens = torch.zeros(len(sequences), length, dtype=torch.int64)
    prefixes = torch.zeros_like(tokens)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        for t, token in enumerate(sequence):
            tokens[i, t], prefixes[i, t], mask[i, t] = token, rows[sequence[:t]], True
    return Tree(tokens, prefixes, mask, len(rows), vocabulary)


def logprobs(logits: Tensor, all_sequences: Tree) -> Tensor:
    """log pi of every token of every sequence, [M, T], 0 on padding; differentiable in logits [rows, V]."""
    table = torch.log_softmax(logits, -1)
    return torch.where(all_sequences.mask, table[all_sequences.prefixes, all_sequences.tokens], 0.0)


def probabilities(token_logprobs: Tensor) -> Tensor:
    """[M], from [M, T]; they add up to 1."""
    return token_logprobs.sum(-1).exp()


def coefficients(
    objective: Objective,
    current: Tensor,
    proximal: Tensor,
    rollout: Tensor,
    advantages: Tensor,
    mask: Tensor,
    **inputs: Tensor,
) -> Tensor:
    """c_t of every sequence, [M, T]: the derivative by log pi_t of one sequence's term, as autograd gives it.

    "One sequence's term" is what stands under the mean over sequences, or under the sum over tokens before it is
    divided by the batch's tokens or by a constant: all denominators are 1.
    """
    current = current.detach().requires_grad_()
    ones = torch.ones(len(mask), dtype=torch.int64)
    batch = LossInputs(current, proximal, rollout, advantages, mask, prompt_tokens=ones, **inputs)
    loss = objective.loss(batch, Denominators(sequences=1, tokens=1, max_length=1, prompts=1)).loss
    return -torch.autograd.grad(loss, current)[0]


def expected_gradient(coefficient: Tensor, weights: Tensor, logits: Tensor, all_sequences: Tree) -> Tensor:
    """sum_y weights(y) sum_t c_t grad log pi_t, [rows, V]: the mean of a gradient estimate over its sampling policy.

    coefficient: [M, T]. weights: [M], the probability with which each sequence is sampled.
    """
    logits = logits.detach().requires_grad_()
    total = (weights[:, None] * coefficient * logprobs(logits, all_sequences)).sum()
    return torch.autograd.grad(total, logits)[0]


def gradient_of_mean(values: Tensor, logits: Tensor, all_sequences: Tree) -> Tensor:
    """grad E_pi[values], [rows, V]; values: [M], held constant."""
    logits = logits.detach().requires_grad_()
    mean = (probabilities(logprobs(logits, all_sequences)) * values).sum()
    return torch.autograd.grad(mean, logits)[0]


def weighted_variance(values: Tensor, weights: Tensor) -> Tensor:
    """Var of values [M] under probabilities [M]."""
    mean = (weights * values).sum()
    return (weights * (values - mean).square()).sum()
