"""Trust regions of a token's probability, not of a ratio: a ratio of 2 is nothing at 1e-4 and everything at 0.5.

p = pi(y_t), q = the other policy's probability of the same token; each as two outcomes, this token and any other.

    binary_tv   |p - q|
    binary_kl   q log(q/p) + (1-q) log((1-q)/(1-p))

DPPO, 2602.04879; verl's dppo_tv and dppo_kl, and its authors' code (sail-sg/Stable-RL), agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.objectives.cells import Divergence
from pipeline.objectives.terms.surrogates import Term

CERTAIN = -1e-8
"""The largest log-prob that a KL is taken of: at 0 the other outcomes have no probability to compare."""


def divergence(kind: Divergence, logprobs: Tensor, other: Tensor) -> Tensor:
    """The distance at each token, >= 0; logprobs, other: [S, T], log p and log q, 0 or below."""
    if kind == "binary_tv":
        return (logprobs.exp() - other.exp()).abs()
    p, q = logprobs.clamp(max=CERTAIN), other.clamp(max=CERTAIN)
    rest_p, rest_q = (torch.log(-torch.expm1(x)) for x in (p, q))
    return q.exp() * (q - p) + rest_q.exp() * (rest_q - rest_p)


def trust_region(
    advantages: Tensor,
    logprobs: Tensor,
    other: Tensor,
    kind: Divergence,
    bounds: tuple[float, float],
    *,
    both: bool,
    largest_weight: float | None,
) -> Term:
    """M sg[min(p/q, largest_weight)] A log p; c = M min(p/q, largest_weight) A.

    M = 0 where A > 0, p > q and the distance is above bounds[1], or A < 0, p < q and it is above bounds[0] (DPPO).
    both: M = 0 where the distance is above the bound of its side, whatever the sign of A (prime-rl's IPO).
    logprobs, other: [S, T], 0 on untrained tokens; the first is differentiable. advantages: [S, 1] or [S, T].
    """
    low, high = bounds
    p = logprobs.detach()
    distance = divergence(kind, p, other)
    above, below = (p > other) & (distance > high), (p < other) & (distance > low)
    cut = (above | below) & (advantages != 0)
    if not both:
        cut = (above & (advantages > 0)) | (below & (advantages < 0))
    weight = (p - other).exp().clamp(max=math.inf if largest_weight is None else largest_weight) * ~cut
    return Term(weight * advantages * logprobs, weight, cut)
