"""KL estimators, their means and the means of their gradients, over a vocabulary of five."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.objectives import LossInputs, NonFiniteRatio, ObjectiveConfig, resolve
from pipeline.objectives.terms.kl import kl_estimate
from tests.support.batches import make_batch, whole
from tests.support.enumeration import logprobs, probabilities, tree

TOKENS = tree(vocabulary=5, length=1, stop=False)
_generator = torch.Generator().manual_seed(0)
PI, MU, REFERENCE = (torch.randn(1, 5, generator=_generator, dtype=torch.float64) for _ in range(3))


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()


def _mean_and_gradient(estimator, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate's mean over samples of a fixed sampler, and its gradient by pi's logits."""
    logits = PI.clone().requires_grad_()
    current, reference, rollout = (logprobs(x, TOKENS) for x in (logits, REFERENCE, MU))
    importance = (current - rollout).exp() if estimator == "unbiased_k3" else None
    estimate = kl_estimate(reference - current, estimator, importance)
    mean = (probabilities(logprobs(sampler, TOKENS))[:, None] * estimate).sum()
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


def _gradient(value, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(value(logits), logits)[0]


TRUE_GRADIENT = _gradient(lambda logits: _kl(logits, REFERENCE), PI)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_kl_as_their_mean_on_policy(estimator) -> None:
    assert _mean_and_gradient(estimator, PI)[0].item() == pytest.approx(_kl(PI, REFERENCE).item(), rel=1e-13)


def test_the_gradient_of_k1_has_mean_zero_on_policy() -> None:
    assert _mean_and_gradient("k1", PI)[1].abs().max() < 1e-15


def test_the_gradient_of_k2_is_that_of_the_kl_on_policy_though_its_value_is_not_the_kl() -> None:
    value, gradient = _mean_and_gradient("k2", PI)
    torch.testing.assert_close(gradient, TRUE_GRADIENT, rtol=1e-12, atol=1e-15)
    assert abs(value.item() / _kl(PI, REFERENCE).item() - 1) > 0.1


def test_the_gradient_of_k3_is_that_of_the_kl_the_other_way_round() -> None:
    other = _gradient(lambda logits: _kl(REFERENCE, logits), PI)
    torch.testing.assert_close(_mean_and_gradient("k3", PI)[1], other, rtol=1e-12, atol=1e-15)
    assert (other - TRUE_GRADIENT).norm() > 0.1 * TRUE_GRADIENT.norm()


def test_unbiased_k3_has_value_and_gradient_of_the_kl_on_tokens_sampled_from_mu() -> None:
    value, gradient = _mean_and_gradient("unbiased_k3", MU)
    assert value.item() == pytest.approx(_kl(PI, REFERENCE).item(), rel=1e-13)
    torch.testing.assert_close(gradient, TRUE_GRADIENT, rtol=1e-12, atol=1e-15)
    assert abs(_mean_and_gradient("k3", MU)[0].item() / value.item() - 1) > 0.1


def _loss(x: LossInputs, **kl) -> tuple[Tensor, Tensor]:
    out = resolve(ObjectiveConfig(preset="grpo", **({"kl": kl} if kl else {}))).loss(x, whole(x, 7))
    return out.loss.detach(), torch.autograd.grad(out.loss, x.current_logprobs)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "unbiased_k3"])
def test_a_kl_in_the_loss_is_beta_times_the_estimate_under_the_same_reduction(estimator) -> None:
    x = make_batch("grpo", 0)
    x = replace(x, reference_logprobs=x.proximal_logprobs - 0.2)
    assert x.reference_logprobs is not None
    loss, gradient = _loss(x, estimator=estimator, beta=0.3)
    plain_loss, plain_gradient = _loss(x)
    current = x.current_logprobs.detach().requires_grad_()
    importance = (current - x.rollout_logprobs).exp() if estimator == "unbiased_k3" else None
    estimate = kl_estimate(x.reference_logprobs - current, estimator, importance) * x.mask
    penalty = 0.3 * (estimate.sum(-1) / x.mask.sum(-1).clamp(min=1)).mean()
    torch.testing.assert_close(loss - plain_loss, penalty.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        gradient - plain_gradient, torch.autograd.grad(penalty, current)[0], rtol=1e-10, atol=1e-14
    )


def test_beta_zero_needs_no_reference() -> None:
    assert not resolve(ObjectiveConfig(preset="grpo", kl={"beta": 0})).needs_reference


def test_a_reference_that_finds_a_token_impossible_stops_the_update() -> None:
    x = make_batch("grpo", 0)
    reference = x.proximal_logprobs.clone()
    reference[1, 0] = -torch.inf
    with pytest.raises(NonFiniteRatio, match=r"reference/current is not finite .* in sequence 1"):
        _loss(replace(x, reference_logprobs=reference), beta=0.1)


def test_a_missing_reference_or_ratio_is_named() -> None:
    with pytest.raises(ValueError, match=r"inputs.reference_logprobs"):
        _loss(make_batch("grpo", 0), beta=0.1)
    with pytest.raises(ValueError, match="importance_ratio"):
        kl_estimate(torch.zeros(1, 1), "unbiased_k3")
