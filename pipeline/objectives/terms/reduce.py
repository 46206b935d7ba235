"""From a term per token, or per sequence, to a scalar, with the denominators of the whole mini-batch.

    sequence_mean_token_mean   (1/S) sum_i (1/N_i) sum_t x_it        GRPO
    sequence_mean_token_sum    (1/S) sum_i sum_t x_it                REINFORCE
    token_mean                 sum_i sum_t x_it / sum_i N_i          DAPO
    token_sum_constant         sum_i sum_t x_it / (S * max_length)   Dr.GRPO
    sequence_mean              (1/S) sum_i x_i                       GSPO; x is one number per sequence

Each is a weight that is constant along a sequence, so a term per sequence, x_it = x_i, needs nothing of its own: under
sequence_mean_token_mean it counts once, under sequence_mean_token_sum N_i times (that is Dr.GSPO).

S and sum N_i are the mini-batch's, given from outside: sequences without tokens, or dropped by a correction, still
count in them. An estimate of an expectation over mu divides by what was sampled, not by what was kept.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pipeline.objectives.types import Denominators

Reduction = Literal[
    "sequence_mean_token_mean", "sequence_mean_token_sum", "token_mean", "token_sum_constant", "sequence_mean"
]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def token_weights(reduction: Reduction, lengths: Tensor, denominators: Denominators) -> Tensor:
    """What one token of each sequence counts.

    lengths: [S, 1], tokens, floating. Returns [S, 1], finite where N = 0: no token is there to be counted.
    """
    if reduction in ("sequence_mean_token_mean", "sequence_mean"):
        return 1.0 / (denominators.sequences * lengths.clamp(min=1))
    if reduction == "sequence_mean_token_sum":
        return torch.full_like(lengths, 1.0 / denominators.sequences)
    if reduction == "token_mean":
        return torch.full_like(lengths, 1.0 / max(denominators.tokens, 1))
    if reduction == "token_sum_constant":
        return torch.full_like(lengths, 1.0 / (denominators.sequences * denominators.max_length))
    raise ValueError(f"unknown reduction {reduction!r}; there are {', '.join(REDUCTIONS)}")


def reduce(term: Tensor, lengths: Tensor, reduction: Reduction, denominators: Denominators) -> Tensor:
    """This subset's share of the mini-batch's reduced term.

    term: [S, T], 0 on padding, or [S, 1], one number per sequence. lengths: [S, 1], tokens, floating. Returns a scalar.
    The shares of any partition of the mini-batch into sequences add up to the value of the whole.
    """
    per_sequence = term * lengths if term.shape[1] == 1 else term.sum(-1, keepdim=True)
    return (per_sequence * token_weights(reduction, lengths, denominators)).sum()
