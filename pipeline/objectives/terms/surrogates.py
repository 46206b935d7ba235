"""Terms whose gradient stands in for the policy gradient, each with its gradient written out.

A term is A f, to be maximised. Every function returns, per unit of advantage,

    value   f, or None where the term is slope * log pi_t with the slope held constant
    slope   g, so that c_t = A g is the coefficient of grad log pi_t in the gradient of the term
    cut     how many ratios of each sequence a clip, bound or mask changed

`ratio` is the value of r_t [S, T], of s [S, 1] or of s_t [S, 1] (ratios.py). A term per sequence counts once per token
in the sums of reduce.py, N times, and its derivative by each token's log pi is 1/N of its derivative by log s; the two
cancel, so value and slope are weighed alike, whether they are [S, T] or [S, 1].

The slope is written, not left to autograd: it is the table's c_t, it can be looked at, and it costs one matrix instead
of a graph. Tests hold it against autograd of the plain equation and against finite differences.

`advantages` [S, 1] or [S, T] are read for their sign only. Where A = 0 nothing is clipped, and the term and its
gradient are 0. Ratios are finite here (ratios.py stops the others); a nan would pass through to the loss.
Nothing here is differentiable, and no argument is changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """value: [S, T], [S, 1] or None. slope: [S, T] or [S, 1]. cut: [S, 1], a count. The caller may write into them."""

    value: Tensor | None
    slope: Tensor
    cut: Tensor


def reinforce(weight: Tensor) -> Term:
    """sg[weight] A log pi; c = weight A (Williams 1992; off-policy with the ratio as weight).

    weight: [S, T] or [S, 1]; it comes back as the slope.
    """
    return Term(None, weight, torch.zeros_like(weight[:, :1]))


def clip(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Term:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and with dual_clip max(that, dual_clip A) where A < 0.

    PPO, 1707.06347, eq. 7; dual clip 1912.09729; on s, GSPO 2507.18071, eq. 5. c = r A inside, 0 outside; the edges
    themselves are inside. The min bounds r from above where A > 0 and from below where A < 0, and the dual clip bounds
    it from above where A < 0: one clamp, its bounds chosen by the sign of A.
    """
    lower, upper = _bounds(advantages, 1 - clip_low, 1 + clip_high, dual_clip)
    value = _clamp(ratio, lower, upper)
    kept = _equal(value, ratio)
    cut = _count_zeros(kept)
    return Term(value, kept.mul_(ratio), cut)


def stop_gradient_clip(ratio: Tensor, clip_low: float | None, clip_high: float) -> Term:
    """sg[clip(r, 1 - clip_low, 1 + clip_high)] A log pi; c = clip(r) A (CISPO, 2506.13585, eq. 4 and 5).

    clip_low None: no lower bound. Every token keeps a gradient; `cut` counts ratios that were bounded.
    """
    weight = torch.clamp(ratio, 0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return Term(None, weight, _count_zeros(_equal(weight, ratio)))


def soft_gate(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Term:
    """f(r) A, f(r) = (4/tau) sigmoid(tau (r - 1)), tau by the sign of A (SAPO, 2511.20347).

    c = 4 p (1 - p) r A = sech^2(tau (r - 1) / 2) r A, p the sigmoid: r A at r = 1, fading on both sides. A large r
    saturates p: the term is bounded by 4 A / tau and c goes to 0. Nothing is cut: the gate has no edge.
    """
    tau = torch.full_like(advantages, tau_negative).masked_fill_(advantages > 0, tau_positive)
    gate = (ratio - 1).mul_(tau) if tau.shape[1] == 1 else (ratio - 1) * tau
    gate.sigmoid_()
    slope = (1 - gate).mul_(gate).mul_(ratio).mul_(4)
    return Term(gate.mul_(4 / tau) if tau.shape[1] == 1 else gate * (4 / tau), slope, torch.zeros_like(gate[:, :1]))


def mask(ratio: Tensor, advantages: Tensor, weight: Tensor, clip_low: float, clip_high: float) -> Term:
    """M sg[weight] A log pi; M = 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low.

    MiniRL, 2512.01374. c = M weight A. ratio is current/proximal; weight is that ratio, or 1 where a correction holds
    current/rollout (MiniRL truncates it there).
    """
    kept = _equal(_clamp(ratio, *_bounds(advantages, 1 - clip_low, 1 + clip_high)), ratio)
    cut = _count_zeros(kept)
    return Term(None, kept.mul_(weight) if weight.shape[1] <= kept.shape[1] else kept * weight, cut)


def log_space_clip(log_ratio: Tensor, lengths: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Term:
    """A exp(mean_t l'_t), l' = min(l, clip_high) where A > 0 and max(l, -clip_low) where A < 0; l = log r_t.

    GMPO, 2507.20673: the geometric mean of the clipped token terms, with the sign of A. c = A s' / N where the token is
    not clipped, s' the clipped sequence ratio.

    log_ratio: [S, T], 0 on padding. lengths, advantages: [S, 1]. The value is [S, 1]; the slope is [S, T], and `cut`
    counts tokens.
    """
    clamped = _clamp(log_ratio, *_bounds(advantages, -clip_low, clip_high))
    kept = _equal(clamped, log_ratio)
    value = torch.exp(clamped.sum(-1, keepdim=True) / lengths.clamp(min=1))
    cut = _count_zeros(kept)
    return Term(value, kept.mul_(value), cut)


def _bounds(
    advantages: Tensor,
    lower_where_negative: float,
    upper_where_positive: float,
    upper_where_negative: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Bounds of the ratio by the sign of A; infinite where that side is open, and on both sides where A = 0."""
    lower = torch.full_like(advantages, -torch.inf).masked_fill_(advantages < 0, lower_where_negative)
    upper = torch.full_like(advantages, torch.inf).masked_fill_(advantages > 0, upper_where_positive)
    if upper_where_negative is not None:
        upper.masked_fill_(advantages < 0, upper_where_negative)
    return lower, upper


def _clamp(values: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    # Twice as fast as torch.clamp with tensor bounds, which does not vectorise on a CPU.
    clamped = torch.minimum(values, upper)
    return torch.maximum(clamped, lower, out=clamped)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """1.0 where equal, else 0.0, in a's dtype: comparisons into bool do not vectorise on a CPU."""
    return torch.eq(a, b, out=torch.empty_like(a))


def _count_zeros(kept: Tensor) -> Tensor:
    return kept.shape[1] - kept.sum(-1, keepdim=True)
