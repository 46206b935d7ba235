"""Every preset's loss once more, as the plainest torch code for its equation, differentiated by autograd.

Nothing runs this but the tests, which hold the composed objectives against it, and the benchmark. The numbers are the
presets' defaults. No checks, no metrics; padding must hold finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.objectives.types import Denominators, LossInputs


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantages, torch.clamp(ratio, 1 - low, 1 + high) * advantages)


def _token_ratio(x: LossInputs) -> Tensor:
    return torch.exp(x.current_logprobs - x.proximal_logprobs)


def _sequence_ratio(x: LossInputs) -> tuple[Tensor, Tensor]:
    log_ratio = (x.current_logprobs - x.proximal_logprobs) * x.mask
    lengths = x.mask.sum(-1)
    return torch.exp(log_ratio.sum(-1) / lengths.clamp(min=1)), lengths


def _token_mean(term: Tensor, x: LossInputs, d: Denominators) -> Tensor:
    return -(term * x.mask).sum() / d.tokens


def _sequence_token_mean(term: Tensor, x: LossInputs, d: Denominators) -> Tensor:
    return -((term * x.mask).sum(-1) / x.mask.sum(-1).clamp(min=1)).sum() / d.sequences


def _sequence_token_sum(term: Tensor, x: LossInputs, d: Denominators) -> Tensor:
    return -(term * x.mask).sum() / d.sequences


def reinforce(x: LossInputs, d: Denominators) -> Tensor:
    rho = torch.exp(x.current_logprobs - x.rollout_logprobs).detach()
    return _sequence_token_sum(rho * x.advantages[:, None] * x.current_logprobs, x, d)


def ppo(x: LossInputs, d: Denominators) -> Tensor:
    policy = _token_mean(_clipped(_token_ratio(x), x.advantages, 0.2, 0.2), x, d)
    assert x.values is not None
    assert x.proximal_values is not None
    assert x.returns is not None
    clipped = x.proximal_values + torch.clamp(x.values - x.proximal_values, -0.2, 0.2)
    squared = torch.maximum((x.values - x.returns) ** 2, (clipped - x.returns) ** 2)
    return policy - 0.5 * _token_mean(0.5 * squared, x, d)


def reinforce_plus_plus(x: LossInputs, d: Denominators) -> Tensor:
    return _token_mean(_clipped(_token_ratio(x), x.advantages, 0.2, 0.2), x, d)


def grpo(x: LossInputs, d: Denominators) -> Tensor:
    return _sequence_token_mean(_clipped(_token_ratio(x), x.advantages[:, None], 0.2, 0.2), x, d)


def dr_grpo(x: LossInputs, d: Denominators) -> Tensor:
    term = _clipped(_token_ratio(x), x.advantages[:, None], 0.2, 0.2)
    return -(term * x.mask).sum() / (d.sequences * d.max_length)


def dapo(x: LossInputs, d: Denominators) -> Tensor:
    return _token_mean(_clipped(_token_ratio(x), x.advantages[:, None], 0.2, 0.28), x, d)


def gspo(x: LossInputs, d: Denominators) -> Tensor:
    ratio, lengths = _sequence_ratio(x)
    return -((lengths > 0) * _clipped(ratio, x.advantages, 3e-4, 4e-4)).sum() / d.sequences


def gspo_token(x: LossInputs, d: Denominators) -> Tensor:
    ratio = _sequence_ratio(x)[0].detach()[:, None] * torch.exp(x.current_logprobs - x.current_logprobs.detach())
    return _sequence_token_mean(_clipped(ratio, x.advantages[:, None], 3e-4, 4e-4), x, d)


def dr_gspo(x: LossInputs, d: Denominators) -> Tensor:
    ratio, lengths = _sequence_ratio(x)
    return -(lengths * _clipped(ratio, x.advantages, 3e-4, 4e-4)).sum() / d.sequences


def gmpo(x: LossInputs, d: Denominators) -> Tensor:
    sign = x.advantages.sign()[:, None]
    log_ratio = sign * (x.current_logprobs - x.proximal_logprobs)
    clipped = sign * torch.minimum(log_ratio, torch.clamp(log_ratio, -0.4, 0.4))
    lengths = x.mask.sum(-1)
    ratio = torch.exp((clipped * x.mask).sum(-1) / lengths.clamp(min=1))
    return -((lengths > 0) * ratio * x.advantages).sum() / d.sequences


def cispo(x: LossInputs, d: Denominators) -> Tensor:
    ratio = torch.clamp(_token_ratio(x), max=5.0).detach()
    return _token_mean(ratio * x.advantages[:, None] * x.current_logprobs, x, d)


def sapo(x: LossInputs, d: Denominators) -> Tensor:
    advantages = x.advantages[:, None]
    tau = torch.where(advantages > 0, torch.ones_like(advantages), torch.full_like(advantages, 1.05))
    return _sequence_token_mean(torch.sigmoid(tau * (_token_ratio(x) - 1)) * 4 / tau * advantages, x, d)


def minirl(x: LossInputs, d: Denominators) -> Tensor:
    advantages = x.advantages[:, None]
    ratio = _token_ratio(x).detach()
    weight = torch.clamp(torch.exp(x.current_logprobs - x.rollout_logprobs), max=5.0).detach()
    masked = ((advantages > 0) & (ratio > 1.27)) | ((advantages < 0) & (ratio < 0.8))
    return _sequence_token_sum(~masked * weight * advantages * x.current_logprobs, x, d)


def areal_grpo(x: LossInputs, d: Denominators) -> Tensor:
    weight = torch.exp(x.proximal_logprobs - x.rollout_logprobs)
    term = _clipped(_token_ratio(x), x.advantages[:, None], 0.4, 0.4)
    return _token_mean(term * weight * (weight <= 5), x, d)


def areal_gspo(x: LossInputs, d: Denominators) -> Tensor:
    ratio, lengths = _sequence_ratio(x)
    return -(lengths * _clipped(ratio, x.advantages, 0.4, 0.4)).sum() / d.tokens


PLAIN: dict[str, Callable[[LossInputs, Denominators], Tensor]] = {
    "reinforce": reinforce,
    "rloo": reinforce,
    "reinforce_plus_plus": reinforce_plus_plus,
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "dr_gspo": dr_gspo,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "minirl": minirl,
    "areal_grpo": areal_grpo,
    "areal_gspo": areal_gspo,
}
