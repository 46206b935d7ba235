"""From a term per token, or per sequence, to a scalar, with the denominators of the whole mini-batch.

    sequence_mean_token_mean   (1/S) sum_i (1/N_i) sum_t x_it            GRPO
    sequence_mean_token_sum    (1/S) sum_i sum_t x_it                    REINFORCE
    prompt_token_mean          (1/P) sum_i (1/M_i) sum_t x_it            DAPO, CISPO; M_i = sum of N over i's prompt
    token_mean                 sum_i sum_t x_it / sum_i N_i              PPO; what most code ships under DAPO
    token_sum_constant         sum_i sum_t x_it / (S * max_length)       Dr.GRPO
    sequence_mean              (1/S) sum_i x_i                           GSPO; x is one number per sequence

Every N counts trained tokens: those of the mask. P is the number of prompts. Each reduction is a weight that is
constant along a sequence, so a term per sequence, x_it = x_i, needs nothing of its own: under sequence_mean_token_mean
it counts once, under sequence_mean_token_sum N_i times (that is Dr.GSPO).

S, P, M and sum N are the mini-batch's, given from outside: sequences without tokens, or dropped by a correction, still
count in them. An estimate of an expectation over mu divides by what was sampled, not by what was kept.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from pipeline.objectives.cells import Reduction
from pipeline.objectives.types import Denominators

REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def token_weights(
    reduction: Reduction, lengths: Tensor, denominators: Denominators, prompt_tokens: Tensor | None = None
) -> Tensor:
    """What one token of each sequence counts.

    lengths: [S, 1], trained tokens, floating. prompt_tokens: [S], trained tokens of the sequence's prompt, all its
    samples together; for prompt_token_mean only. Returns [S, 1], finite where N = 0: no token is there to be counted.
    """
    if reduction in ("sequence_mean_token_mean", "sequence_mean"):
        return 1.0 / (denominators.sequences * lengths.clamp(min=1))
    if reduction == "sequence_mean_token_sum":
        return torch.full_like(lengths, 1.0 / denominators.sequences)
    if reduction == "prompt_token_mean":
        if prompt_tokens is None or denominators.prompts is None:
            raise ValueError(
                "reduction prompt_token_mean divides by the tokens of each prompt and by the prompts: pass "
                "prompt_tokens and Denominators.prompts"
            )
        return 1.0 / (denominators.prompts * prompt_tokens.to(lengths.dtype)[:, None].clamp(min=1))
    if reduction == "token_mean":
        return torch.full_like(lengths, 1.0 / max(denominators.tokens, 1))
    if reduction == "token_sum_constant":
        return torch.full_like(lengths, 1.0 / (denominators.sequences * denominators.max_length))
    raise ValueError(f"unknown reduction {reduction!r}; there are {', '.join(REDUCTIONS)}")


def reduce(term: Tensor, mask: Tensor, per_token: Tensor) -> Tensor:
    """This subset's share of the mini-batch's reduced term, a scalar.

    term: [S, T], finite everywhere, or [S, 1], one number per sequence. mask: [S, T] bool, trained tokens.
    per_token: [S, 1] of `token_weights`. The shares of any partition of the mini-batch into sequences add up to the
    value of the whole.
    """
    if is_per_token(term, mask):
        return ((term * mask).sum(-1, keepdim=True) * per_token).sum()
    return (term * mask.sum(-1, keepdim=True) * per_token).sum()


def is_per_token(values: Tensor, mask: Tensor) -> bool:
    """Whether values are [S, T] like the mask, and not [S, 1]; of one token they are both."""
    return values.shape == mask.shape
