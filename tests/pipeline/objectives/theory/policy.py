"""The policies that the tests of the theory share: every sequence of a small one, in float64.

V = 3, at most 6 tokens, token 0 stops. mu is drawn at random; pi is mu moved by delta along a random direction.
t: the true ratio prod r_t;  g1 = 1 + sum delta_t (GRPO without 1/N);  s~ = 1 + N (s - 1) (Dr.GSPO);  delta_t = r_t - 1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.objectives import ObjectiveConfig, resolve
from tests.support.enumeration import coefficients, expected_gradient, logprobs, probabilities, tree

ALL = tree(vocabulary=3, length=6)
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


BASE, DIRECTION, REWARDS = _normal(ALL.rows, 3), _normal(ALL.rows, 3), _normal(len(ALL.tokens))
MU = logprobs(BASE, ALL)
P = probabilities(MU)
N = ALL.lengths
UNCLIPPED = {"clip_low": 1.0, "clip_high": 1e9}
EXACT = {"preset": "reinforce", "correction": {"kind": "sequence_is", "numerator": "current"}}
GRPO_SUM = {"preset": "dr_grpo", "reduction": "sequence_mean_token_sum", **UNCLIPPED}
DR_GSPO = {"preset": "dr_gspo", **UNCLIPPED}


def mean_gradient(config: dict, delta: float, rewards: Tensor, proximal: Tensor = MU) -> Tensor:
    """The mean over mu of an objective's gradient at pi = mu moved by delta."""
    logits = BASE + delta * DIRECTION
    current = logprobs(logits, ALL)
    c = coefficients(resolve(ObjectiveConfig(**config)), current, proximal, MU, rewards, ALL.mask)
    return expected_gradient(c, P, logits, ALL)


def ratios(delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta_t [M, T], t, g1, s~ [M]."""
    log_r = logprobs(BASE + delta * DIRECTION, ALL) - MU
    deltas = log_r.expm1()
    return deltas, log_r.sum(-1).exp(), 1 + deltas.sum(-1), 1 + N * ((log_r.sum(-1) / N).exp() - 1)


def slopes(errors: list[float]) -> list[float]:
    """log2 of successive quotients, for a delta that is halved each time."""
    return [math.log2(abs(a / b)) for a, b in pairwise(errors)]
