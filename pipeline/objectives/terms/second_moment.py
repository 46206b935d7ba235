"""The tokens that a bound on the second moment of log-ratios keeps (M2PO, 2510.01161).

    M = the largest set of tokens, those of largest (log w_t)^2 dropped first, with  mean over M of (log w_t)^2 < bound

log w = log pi_o - log mu, over all trained tokens of the batch: so it is decided once, before the batch is split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives.terms.log_ratios import token_log_ratio, trained


def kept_tokens(proximal_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, bound: float) -> Tensor:
    """[S, T] bool, trained tokens that stay. Where no single token is below the bound, none stays.

    proximal_logprobs, rollout_logprobs: [S, T]. mask: [S, T] bool. bound: nats^2. Raises NonFiniteRatio.
    """
    proximal, rollout = (trained(x.detach(), mask) for x in (proximal_logprobs, rollout_logprobs))
    squares = token_log_ratio(proximal, rollout, "proximal/rollout").square()
    ascending, order = squares[mask].sort()
    count = torch.arange(1, len(ascending) + 1, device=mask.device)
    # Means of ascending numbers ascend, so those below the bound come first.
    stay = int((ascending.cumsum(0) / count < bound).sum())
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:stay]] = True
    out = torch.zeros_like(mask)
    out[mask] = kept
    return out
