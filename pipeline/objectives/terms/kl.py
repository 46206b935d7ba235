"""Estimates of KL(pi || pi_ref) on tokens sampled from pi, or nearly. l = log pi_ref - log pi on the sampled token.

    k1 = -l                          unbiased value; its gradient has mean 0, so in the loss it does nothing on policy
    k2 = l^2 / 2                     biased value; on policy its gradient is unbiased for the gradient of the KL
    k3 = e^l - 1 - l                 unbiased value, never negative; its gradient is that of KL(pi_ref || pi)
    unbiased_k3 = (pi/mu) k3         value and gradient unbiased, token by token, for tokens sampled from mu

k1 to k3: Schulman, "Approximating KL divergence" (2020). k3 in the loss: GRPO, 2402.03300, eq. 4. unbiased_k3:
DeepSeek-V3.2, 2512.02556, eq. 7.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.objectives.cells import KLEstimator


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator, importance_ratio: Tensor | None = None) -> Tensor:
    """The estimate at each token, nats.

    log_ratio: [S, T], l, 0 on untrained tokens (the estimate is 0 there); differentiable. e^l must be finite
    (log_ratios.py checks).
    importance_ratio: [S, T], pi/mu, differentiable; for unbiased_k3 only.
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    k3 = log_ratio.expm1() - log_ratio
    if estimator == "k3":
        return k3
    if estimator != "unbiased_k3":
        raise ValueError(f"unknown KL estimator {estimator!r}; there are k1, k2, k3, unbiased_k3")
    if importance_ratio is None:
        raise ValueError("unbiased_k3 is (pi/mu) k3: pass importance_ratio")
    return importance_ratio * k3
