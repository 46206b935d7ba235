"""Factors for the discrepancy between the trainer and the rollout engine.

    w_t = pi_o(y_t) / mu(y_t)      W = prod_t w_t      W^(1/N) = exp(mean_t log w_t)

(pi in pi_o's place where numerator is "current"). A factor is a constant: nothing flows through it. Clip on pi/pi_o,
correct with pi_o/mu: a rollout log-prob inside the clip would clip on the engines' difference instead of on learning.

    token_is         w                                          importance sampling to first order (2512.01374)
    token_tis        min(w, high)                               Ionides 2008; Yao et al. 2025 (fengyao.notion.site)
    token_mis        w 1[low <= w <= high]                      Liu et al. 2025 (yingru.notion.site)
    icepop           the same, with a lower bound               IcePop, 2510.18855
    mean_mis         mean_t (w 1[low <= w <= high])             AReaL v0.5.0 on a sequence term
    sequence_is      W                                          the exact weight
    sequence_tis     min(W, high)
    sequence_mis     W 1[low <= W <= high]                      Liu et al. 2025
    geometric_is     W^(1/N)                                    GSPO's ratio, for pi_o/mu
    geometric_tis    min(W^(1/N), high)
    geometric_mask   1[low <= W^(1/N) <= high]                  no weight, a rejection
    opsm             0 where A < 0 and mean log(mu/pi) > high   DeepSeek-V3.2, 2512.02556, eq. 9
    reject           1[low <= statistic <= high]                verl's rollout_rs, AReaL's rejection_sampling; of an
                                                                answer's largest: TRM, 2512.23075

The statistic of reject is k1 = -l, k2 = l^2/2 or k3 = e^l - 1 - l (l = log w) of a token, or its sum, mean or maximum
over an answer's tokens.

Truncation and bounds are taken in log space, so a product over thousands of tokens that overflows is truncated or
dropped exactly as its value asks. Only the unbounded kinds can overflow: they raise NonFiniteRatio.
N and every mean and product are over trained tokens. A sequence without any has W = 1; it holds no term for the factor
to multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.terms.log_ratios import check_finite, sequence_log_ratio


class Factor(NamedTuple):
    """weight: [S, T] or [S, 1], what the term is multiplied by; constant.

    cut:     bool, [S, T] or [S, 1], which weights were truncated, masked or dropped.
    counted: bool of cut's shape, which weights the correction judged: those of trained tokens, or of sequences that
             have some; for opsm only where A < 0. A share of cut is over these.
    """

    weight: Tensor
    cut: Tensor
    counted: Tensor


@torch.no_grad()
def correction_factor(
    config: CorrectionConfig, log_ratio: Tensor, mask: Tensor, advantages: Tensor, samples: Sequence[int] | None = None
) -> Factor:
    """The factor, and how much of it is not the plain weight.

    log_ratio: [S, T], log of numerator/mu, 0 on untrained tokens. mask: [S, T] bool, trained tokens.
    advantages: [S, 1] or [S, T]; read by opsm only: a bad answer that the policy has already moved away from.
    samples: the caller's numbers of the rows, for errors.
    """
    kind = config.kind
    lengths = mask.sum(-1, keepdim=True).to(log_ratio.dtype)
    sequences = lengths > 0
    per_token = config.per_token or kind == "mean_mis"
    counted = mask if per_token else sequences
    if per_token:
        log_weight = log_ratio
    elif kind.startswith("sequence_"):
        log_weight = log_ratio.sum(-1, keepdim=True)
    else:
        log_weight = sequence_log_ratio(log_ratio, lengths)
    if kind == "reject":
        return _rejection(config, log_ratio, mask)
    if kind == "opsm":
        assert config.high is not None
        bad = advantages < 0
        dropped = bad & (-log_weight > config.high)
        return Factor((~dropped).to(log_ratio.dtype), dropped, bad & (mask if bad.shape == mask.shape else sequences))
    low = math.log(config.low) if config.low else -math.inf
    high = math.log(config.high) if config.high is not None else math.inf
    if high == math.inf and kind.startswith("sequence_"):
        check_finite(log_weight, f"{config.numerator}/rollout ({kind})", samples)
    cut = (log_weight < low) | (log_weight > high)
    if kind == "geometric_mask":
        return Factor((~cut).to(log_ratio.dtype), cut, counted)
    weight = log_weight.clamp(low, high).exp()
    if kind.endswith("mis") or kind == "icepop":
        weight = weight * ~cut
    if kind == "mean_mis":
        weight = (weight * mask).sum(-1, keepdim=True) / lengths.clamp(min=1)
    return Factor(weight, cut, counted)


def _rejection(config: CorrectionConfig, log_ratio: Tensor, mask: Tensor) -> Factor:
    """Of tokens [S, T], or of whole sequences [S, 1]."""
    sequences = mask.any(-1, keepdim=True)
    if config.by == "k1":
        values = -log_ratio
    else:
        values = log_ratio.square() / 2 if config.by == "k2" else log_ratio.expm1() - log_ratio
    if config.over == "token":
        statistic, counted = values, mask
    elif config.over == "max":
        least = values.new_full((len(values), 1), -math.inf)  # a call may have no columns
        largest = torch.cat([least, values.masked_fill(~mask, -math.inf)], -1).amax(-1, keepdim=True)
        statistic, counted = torch.where(sequences, largest, 0.0), sequences
    else:
        statistic, counted = values.sum(-1, keepdim=True), sequences
        if config.over == "mean":
            statistic = statistic / mask.sum(-1, keepdim=True).clamp(min=1)
    low = -math.inf if config.low is None else config.low
    high = math.inf if config.high is None else config.high
    cut = ((statistic < low) | (statistic > high)) & counted
    return Factor((~cut).to(log_ratio.dtype), cut, counted)
