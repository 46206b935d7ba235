"""What may stand in each cell of an objective, by name, and which numbers a surrogate reads."""

from __future__ import annotations

from typing import Literal

Advantage = Literal["group_mean", "group_std", "leave_one_out", "mean_relative", "batch_scaled", "batch_std", "gae"]
RatioLevel = Literal["token", "sequence", "sequence_token", "product"]
Surrogate = Literal[
    "reinforce",
    "clip",
    "dual_clip",
    "stop_gradient_clip",
    "soft_gate",
    "mask",
    "log_space_clip",
    "trust_region",
    "gamma_gate",
]
Divergence = Literal["binary_tv", "binary_kl"]
CorrectionKind = Literal[
    "token_is",
    "token_tis",
    "token_mis",
    "icepop",
    "mean_mis",
    "sequence_is",
    "sequence_tis",
    "sequence_mis",
    "geometric_is",
    "geometric_tis",
    "geometric_mask",
    "opsm",
    "reject",
]
Policy = Literal["proximal", "current"]
Reduction = Literal[
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "prompt_token_mean",
    "token_mean",
    "token_sum_constant",
    "sequence_mean",
]
Std = Literal["population", "sample"]
Credit = Literal["episode", "turn"]
KLEstimator = Literal["k1", "k2", "k3", "unbiased_k3"]
RejectBy = Literal["k1", "k2", "k3"]
RejectOver = Literal["token", "sum", "mean", "max"]

NEEDS: dict[str, tuple[str, ...]] = {
    "reinforce": (),
    "clip": ("clip_low", "clip_high"),
    "dual_clip": ("clip_low", "clip_high", "dual_clip"),
    "stop_gradient_clip": ("clip_high",),
    "soft_gate": ("tau_positive", "tau_negative"),
    "mask": ("clip_low", "clip_high"),
    "log_space_clip": ("clip_low", "clip_high"),
    "trust_region": ("divergence", "trust_low", "trust_high"),
    "gamma_gate": ("power_positive", "decay_positive", "power_negative", "decay_negative"),
}
"""What a surrogate reads. stop_gradient_clip reads clip_low too where there is one, and trust_region trust_weight."""
