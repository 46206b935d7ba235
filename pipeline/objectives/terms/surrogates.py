"""Terms whose gradient stands in for the policy gradient.

A term is to be maximised. Every function returns

    value    the term, [S, T] or [S, 1]; differentiable
    weight   w >= 0, so that c_t = w A is the coefficient of grad log pi_t in the gradient of the term; a constant, for
             the check that nothing runs away
    cut      bool, the ratios that a clip, bound or mask changed

`ratio` is r_t [S, T], s [S, 1] or s_t [S, T] (log_ratios.py). A term per sequence counts once per token in the sums of
reduce.py, N times, and its derivative by each token's log pi is 1/N of its derivative by log s; the two cancel, so
terms [S, T] and [S, 1] are weighed alike.

`advantages` [S, 1] or [S, T] are constant. Where A = 0 nothing is clipped, and the term and its gradient are 0. Ratios
and advantages are finite here (log_ratios.py stops the others).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """See the head of this file."""

    value: Tensor
    weight: Tensor
    cut: Tensor


def reinforce(weight: Tensor, advantages: Tensor, logprobs: Tensor) -> Term:
    """sg[weight] A log pi; c = weight A (Williams 1992; off-policy with the ratio as weight).

    weight: [S, T] or [S, 1]. logprobs: [S, T], log pi.
    """
    weight = weight.detach()
    return Term(weight * advantages * logprobs, weight, torch.zeros_like(weight, dtype=torch.bool))


def clip(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Term:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and with dual_clip max(that, dual_clip A) where A < 0.

    PPO, 1707.06347, eq. 7; dual clip 1912.09729; on s, GSPO 2507.18071, eq. 5. c = r A inside, 0 outside; the edges
    themselves are inside. The min bounds r from above where A > 0 and from below where A < 0, and the dual clip bounds
    it from above where A < 0.
    """
    low, high = 1 - clip_low, 1 + clip_high
    cut = _beyond(ratio, advantages, low, high)
    bounded = torch.where(cut, ratio.detach().clamp(low, high), ratio)
    if dual_clip is not None:
        beyond = (advantages < 0) & (ratio.detach() > dual_clip)
        bounded = bounded.masked_fill(beyond, dual_clip)
        cut = cut | beyond
    return Term(bounded * advantages, ratio.detach() * ~cut, cut)


def stop_gradient_clip(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, clip_low: float | None, clip_high: float
) -> Term:
    """sg[clip(r, 1 - clip_low, 1 + clip_high)] A log pi; c = clip(r) A (CISPO, 2506.13585, eq. 4 and 5).

    clip_low None: no lower bound. Every token keeps a gradient; `cut` are the ratios that were bounded.
    """
    weight = ratio.detach().clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return Term(weight * advantages * logprobs, weight, weight != ratio)


def soft_gate(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Term:
    """f(r) A, f(r) = (4/tau) sigmoid(tau (r - 1)), tau by the sign of A (SAPO, 2511.20347).

    c = 4 p (1 - p) r A = sech^2(tau (r - 1) / 2) r A, p the sigmoid: r A at r = 1, fading on both sides. A large r
    saturates p: the term is bounded by 4 A / tau and c goes to 0. Nothing is cut: the gate has no edge.
    """
    tau = _by_sign(advantages, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (ratio - 1))
    weight = (4 * gate * (1 - gate) * ratio).detach()
    return Term(4 / tau * gate * advantages, weight, torch.zeros_like(weight, dtype=torch.bool))


def mask(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, weight: Tensor, clip_low: float, clip_high: float
) -> Term:
    """M sg[weight] A log pi; M = 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low.

    MiniRL, 2512.01374. c = M weight A. ratio is current/proximal; weight is that ratio, or 1 where a correction holds
    current/rollout (MiniRL truncates it there).
    """
    cut = _beyond(ratio, advantages, 1 - clip_low, 1 + clip_high)
    kept = weight.detach() * ~cut
    return Term(kept * advantages * logprobs, kept, cut)


def log_space_clip(log_ratio: Tensor, lengths: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Term:
    """A exp(mean_t l'_t), l' = min(l, clip_high) where A > 0 and max(l, -clip_low) where A < 0; l = log r_t.

    GMPO, 2507.20673: the geometric mean of the clipped token terms, with the sign of A. c = A s' / N where the token is
    not clipped, s' the clipped sequence ratio.

    log_ratio: [S, T], 0 on untrained tokens. lengths, advantages: [S, 1]. The value is [S, 1]; `cut` is [S, T].
    """
    cut = _beyond(log_ratio, advantages, -clip_low, clip_high)
    clipped = torch.where(cut, _by_sign(advantages, clip_high, -clip_low), log_ratio)
    ratio = torch.exp(clipped.sum(-1, keepdim=True) / lengths.clamp(min=1))
    return Term(advantages * ratio, ratio.detach(), cut)


def gamma_gate(
    log_weight: Tensor, advantages: Tensor, logprobs: Tensor, powers: tuple[float, float], decays: tuple[float, float]
) -> Term:
    """sg[phi(W)] A log pi; phi(W) = e^lambda W^k e^(-lambda W), k and lambda by the sign of A; c = phi(W) A.

    VESPO, 2602.10693: W the product of all ratios of an answer, phi(1) = 1, and phi goes to 0 on both sides. Its
    authors' code and TRL agree. powers: k where A > 0, and elsewhere. decays: lambda, the same.
    log_weight: [S, 1], log W; phi is formed in log space, so that a W that overflows weighs 0. logprobs: [S, T].
    """
    log_weight = log_weight.detach()
    k, decay = _by_sign(advantages, *powers), _by_sign(advantages, *decays)
    weight = (decay + k * log_weight - decay * log_weight.exp()).exp()
    return Term(weight * advantages * logprobs, weight, torch.zeros_like(weight, dtype=torch.bool))


def _beyond(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where the ratio has left its bounds on the side to which the advantage pushes it. Bool."""
    ratio = ratio.detach()
    return ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))


def _by_sign(advantages: Tensor, positive: float, otherwise: float) -> Tensor:
    """One number where A > 0 and another elsewhere, in A's own dtype: torch.where of two floats makes float32."""
    return torch.full_like(advantages, otherwise).masked_fill(advantages > 0, positive)
