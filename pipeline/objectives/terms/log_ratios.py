"""Ratios of two policies on sampled tokens, in log space.

    log r_t = log pi_a(y_t | x, y_<t) - log pi_b(y_t | x, y_<t)          token
    log s   = (1/N) sum_t log r_t                                        sequence (GSPO, 2507.18071, eq. 7)
    log s_t = sg[log s] + log pi_t - sg[log pi_t]                        sequence value, token gradient (eq. 14)

N counts trained tokens; an untrained token has log-ratio 0. A sequence without trained tokens has log s = 0: its ratio
is 1, and it holds nothing to weigh.

A ratio that is not a finite number stops the update: it means a broken log-prob, and a clip would hide it. So does a
finite one above e^20 that no clip or bound holds: one token would be the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.objectives.bad_samples import NonFiniteInput, NonFiniteRatio, RunawayRatio

MAX_LOG_WEIGHT = 20.0
"""Nats. The largest weight that a term's gradient may have per unit of advantage is e^20, 4.9e8."""


def token_log_ratio(numerator: Tensor, denominator: Tensor, name: str, samples: Sequence[int] | None = None) -> Tensor:
    """log r_t.

    numerator, denominator: [S, T] log-probs with 0 on untrained tokens; differentiable. name: of the ratio, for the
    error. samples: the caller's numbers of the rows. Raises NonFiniteRatio where log r_t is nan or infinite, or r_t
    overflows the dtype.
    """
    log_ratio = numerator - denominator
    check_finite(log_ratio, name, samples)
    return log_ratio


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """log s, the mean of the token log-ratios.

    log_ratio: [S, T], 0 on untrained tokens. lengths: [S, 1], trained tokens, in log_ratio's dtype. Returns [S, 1]; 0
    where N = 0.
    """
    return log_ratio.sum(-1, keepdim=True) / lengths.clamp(min=1)


def check_finite(log_ratio: Tensor, name: str, samples: Sequence[int] | None = None) -> None:
    """Raise NonFiniteRatio, with the rows, unless every log-ratio [S, ...] is finite and its exp fits the dtype."""
    values = log_ratio.detach().flatten(1)
    bad = ~(values.abs() < torch.inf) | (values > math.log(torch.finfo(values.dtype).max))
    if bad.any():
        first = values[bad][0].item()
        problem = f"is not finite ({int(bad.sum())} log-ratios, the first is {first} in {values.dtype})"
        raise NonFiniteRatio(name, rows_of(bad), problem, samples)


def check_weight(weight: Tensor, name: str, samples: Sequence[int] | None = None) -> None:
    """Raise RunawayRatio, with the rows, where a gradient would be weighed by more than e^MAX_LOG_WEIGHT.

    weight: [S, ...], 0 or above, 0 where it weighs nothing.
    """
    bad = ~(weight <= math.exp(MAX_LOG_WEIGHT))
    if bad.any():
        largest = weight[bad].max().item()
        problem = f"is {largest:.1e}, above the bound of e^{MAX_LOG_WEIGHT:g}, and nothing clips it"
        raise RunawayRatio(name, rows_of(bad), problem, samples)


def trained(values: Tensor, mask: Tensor) -> Tensor:
    """values where a token is trained and 0 elsewhere, whatever stands there; so is the gradient.

    values: [S, T]; or [S], one number a sequence: comes back as [S, 1], 0 where nothing of the sequence is trained.
    mask: [S, T] bool.
    """
    if values.dim() == 1:
        values, mask = values[:, None], mask.any(-1, keepdim=True)
    return torch.where(mask, values, 0.0)


def finite(values: Tensor, mask: Tensor, name: str, samples: Sequence[int] | None = None) -> Tensor:
    """`trained`, and NonFiniteInput with the rows where a number that is read is nan or infinite."""
    values = trained(values, mask)
    bad = ~values.detach().isfinite()
    if bad.any():
        raise NonFiniteInput(name, rows_of(bad), f"is {values.detach()[bad][0].item()}", samples)
    return values


def rows_of(bad: Tensor) -> list[int]:
    """The rows of [S, ...] bool that hold a True."""
    return bad.flatten(1).any(-1).nonzero().flatten().tolist()
