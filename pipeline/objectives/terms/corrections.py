"""Factors for the discrepancy between the trainer and the rollout engine.

    w_t = pi_o(y_t) / mu(y_t)      W = prod_t w_t      W^(1/N) = exp(mean_t log w_t)

(pi in pi_o's place where numerator is "current"). A factor is a constant: nothing flows through it. Clip on pi/pi_o,
correct with pi_o/mu: a rollout log-prob inside the clip would clip on the engines' difference instead of on learning.

    token_is         w                                          importance sampling to first order (2512.01374)
    token_tis        min(w, high)                               Ionides 2008; Yao et al. 2025 (fengyao.notion.site)
    token_mis        w 1[low <= w <= high]                      Liu et al. 2025 (yingru.notion.site)
    icepop           the same, with a lower bound               IcePop, 2510.18855
    sequence_is      W                                          the exact weight
    sequence_tis     min(W, high)
    sequence_mis     W 1[low <= W <= high]                      Liu et al. 2025
    geometric_is     W^(1/N)                                    GSPO's ratio, for pi_o/mu
    geometric_tis    min(W^(1/N), high)
    geometric_mask   1[low <= W^(1/N) <= high]                  no weight, a rejection
    opsm             0 where A < 0 and mean log(mu/pi) > high   DeepSeek-V3.2, 2512.02556, eq. 9

Truncation and bounds are taken in log space, so a product over thousands of tokens that overflows is truncated or
dropped exactly as its value asks. Only the unbounded kinds can overflow: they raise NonFiniteRatio.
A sequence without tokens has W = 1; it holds no term for the factor to multiply.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.objectives.composition import CorrectionConfig
from pipeline.objectives.terms.ratios import check_finite, sequence_log_ratio


@torch.no_grad()
def correction_weight(
    config: CorrectionConfig, log_ratio: Tensor, weights: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """The factor, and how much of it is not the plain weight.

    log_ratio: [S, T], log of numerator/mu, 0 on padding. weights: [S, T], the mask in log_ratio's dtype.
    advantages: [S, 1] or [S, T]; read by opsm only: a bad answer that the policy has already moved away from.
    Returns the factor, [S, T] or [S, 1], and how many weights of each sequence were truncated, masked or dropped,
    [S, 1] (of its tokens for a [S, T] factor, else 0 or 1).
    """
    kind = config.kind
    lengths = weights.sum(-1, keepdim=True)
    if kind.startswith("sequence_"):
        log_weight = log_ratio.sum(-1, keepdim=True)
    elif config.per_token:
        log_weight = log_ratio
    else:
        log_weight = sequence_log_ratio(log_ratio, lengths)
    if kind == "opsm":
        assert config.high is not None
        kept = 1 - ((advantages < 0) & (-log_weight > config.high)).to(log_ratio.dtype)
        return kept, _count_cut(kept, weights, lengths)
    low = math.log(config.low) if config.low else -math.inf
    high = math.log(config.high) if config.high is not None else math.inf
    if high == math.inf and kind.startswith("sequence_"):
        check_finite(log_weight, f"{config.numerator}/rollout ({kind})")
    if kind.endswith("_is"):
        return log_weight.exp(), torch.zeros_like(lengths)
    bounded = log_weight.clamp(low, high)
    kept = torch.eq(bounded, log_weight, out=torch.empty_like(bounded))
    cut = _count_cut(kept, weights, lengths)
    if kind == "geometric_mask":
        return kept, cut
    factor = bounded.exp_()
    return (factor if kind.endswith("_tis") else factor.mul_(kept)), cut


def _count_cut(kept: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    if kept.shape[1] == weights.shape[1]:
        return lengths - torch.linalg.vecdot(kept, weights)[:, None]
    return (1 - kept) * (lengths > 0)
