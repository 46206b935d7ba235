"""How far the trainer and the rollout engine disagree on the same tokens, at the same weights.

l_t = log pi_o(y_t) - log mu(y_t) on tokens sampled from mu. Everything is computed in float64 over a whole batch; a
percentile or an effective sample size does not add up over parts, so gather the log-probs first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Matrix = Tensor | np.ndarray


def mismatch_metrics(proximal_logprobs: Matrix, rollout_logprobs: Matrix, mask: Matrix) -> dict[str, float]:
    """The discrepancy of a batch.

    proximal_logprobs, rollout_logprobs: [S, T], nats. mask: [S, T] bool. Keys:

    mismatch/k1                mean(-l), estimates KL(mu || pi_o), nats per token
    mismatch/k3                mean(e^l - 1 - l), the same KL, never negative
    mismatch/abs_logprob       mean |l|;  mismatch/max_abs_logprob: max |l|;  mismatch/p99: 99th percentile of |l|
    mismatch/ppl_ratio         mean over sequences of exp(-mean_t l): perplexity under pi_o over perplexity under mu
    mismatch/chi2_token        mean e^{2l} - 1;  mismatch/chi2_sequence: mean over sequences of W^2, minus 1
    mismatch/ess               (sum W)^2 / (B sum W^2), W = e^{sum_t l} per sequence; 1 is perfect, 1/B is one survivor
    mismatch/f2                share of tokens with max(e^l, e^-l) > 2
    mismatch/pearson           correlation of the two probabilities; nan where either is constant
    mismatch/nonfinite         tokens whose l is not a finite number; every other key is over the rest

    Sequences without tokens are left out of the sequence metrics. A value that overflows float64 is inf; a mean over
    no tokens is nan. Raises ValueError where the shapes differ.
    """
    log_ratio, where, p, q = _prepare(proximal_logprobs, rollout_logprobs, mask)
    finite = log_ratio.isfinite() & where
    tokens = log_ratio[finite]
    lengths = finite.sum(-1)
    kept = lengths > 0
    log_W = torch.where(finite, log_ratio, 0.0).sum(-1)[kept]
    mean_l = log_W / lengths[kept]
    absolute = tokens.abs()
    some = tokens.numel() > 0
    return {
        "mismatch/k1": (-tokens).mean().item(),
        "mismatch/k3": (tokens.expm1() - tokens).mean().item(),
        "mismatch/abs_logprob": absolute.mean().item(),
        "mismatch/max_abs_logprob": absolute.max().item() if some else float("nan"),
        "mismatch/p99": np.quantile(absolute.numpy(), 0.99).item() if some else float("nan"),
        "mismatch/ppl_ratio": (-mean_l).exp().mean().item(),
        "mismatch/chi2_token": (2 * tokens).exp().mean().item() - 1,
        "mismatch/chi2_sequence": (2 * log_W).exp().mean().item() - 1,
        "mismatch/ess": _effective_sample_size(log_W),
        "mismatch/f2": (absolute > np.log(2.0)).double().mean().item(),
        "mismatch/pearson": _pearson(p[finite].exp(), q[finite].exp()),
        "mismatch/nonfinite": float((where & ~log_ratio.isfinite()).sum()),
    }


def mismatch_by(
    proximal_logprobs: Matrix, rollout_logprobs: Matrix, mask: Matrix, buckets: Matrix
) -> dict[int, dict[str, float]]:
    """k1, k3, mean and max |l| and the number of tokens, per bucket.

    buckets: [S, T] integer, for example the token's position // 256, or the lag of its weight version in updates.
    Tokens whose l is not finite are left out (mismatch_metrics counts them).
    """
    log_ratio, where, _, _ = _prepare(proximal_logprobs, rollout_logprobs, mask)
    keys = torch.as_tensor(buckets)
    finite = log_ratio.isfinite() & where
    out: dict[int, dict[str, float]] = {}
    for bucket in torch.unique(keys[finite]).tolist():
        tokens = log_ratio[finite & (keys == bucket)]
        out[int(bucket)] = {
            "k1": (-tokens).mean().item(),
            "k3": (tokens.expm1() - tokens).mean().item(),
            "abs_logprob": tokens.abs().mean().item(),
            "max_abs_logprob": tokens.abs().max().item(),
            "tokens": float(tokens.numel()),
        }
    return out


def _prepare(proximal: Matrix, rollout: Matrix, mask: Matrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = torch.as_tensor(proximal).detach().cpu().double()
    q = torch.as_tensor(rollout).detach().cpu().double()
    where = torch.as_tensor(mask).detach().cpu().bool()
    if not p.shape == q.shape == where.shape or p.dim() != 2:
        raise ValueError(f"proximal {list(p.shape)}, rollout {list(q.shape)} and mask {list(where.shape)} are [S, T]")
    return p - q, where, p, q


def _effective_sample_size(log_W: Tensor) -> float:
    """(sum W)^2 / (B sum W^2), from the logs, so that it neither overflows nor underflows."""
    if log_W.numel() == 0:
        return float("nan")
    log_ess = 2 * torch.logsumexp(log_W, 0) - torch.logsumexp(2 * log_W, 0)
    return log_ess.exp().item() / log_W.numel()


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return (a * b).sum().item() / scale.item() if scale > 0 else float("nan")
