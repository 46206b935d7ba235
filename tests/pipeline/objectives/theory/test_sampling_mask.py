"""T10: top-p sampling with and without the sampling mask replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.objectives import CorrectionConfig, Denominators, LossInputs, ObjectiveConfig, resolve
from pipeline.objectives.terms.corrections import correction_factor
from tests.pipeline.objectives.theory.policy import ALL, BASE, DIRECTION, EXACT, MU, REWARDS
from tests.support.enumeration import logprobs, probabilities


def _top_p(logits: Tensor, share: float) -> Tensor:
    """Bool, the smallest set of tokens that holds at least this share, per row."""
    probability, order = logits.softmax(-1).sort(-1, descending=True)
    kept = probability.cumsum(-1) - probability < share
    return torch.zeros_like(kept).scatter(-1, order, kept)


def test_t10_without_the_sampling_mask_the_mean_ratio_is_the_kept_mass_and_with_it_one() -> None:
    kept = _top_p(BASE, 0.8)
    sampler = torch.where(kept, BASE, -torch.inf)
    mass = (BASE.softmax(-1) * kept).sum(-1)
    assert mass.min() < 0.9
    behaviour = logprobs(sampler, ALL)
    sampled = probabilities(behaviour) > 0
    weights = probabilities(behaviour)[sampled]
    mask = ALL.mask[sampled]

    def mean_weight(trainer_logits: Tensor, kind: str) -> Tensor:
        """E of the correction's weight: per sequence, or of its first token's."""
        log_ratio = torch.where(mask, logprobs(trainer_logits, ALL)[sampled] - behaviour[sampled], 0.0)
        weight = correction_factor(CorrectionConfig(kind=kind), log_ratio, mask, torch.ones(len(mask), 1)).weight
        return (weights * weight[:, 0]).sum()

    per_sequence = torch.where(ALL.mask, mass[ALL.prefixes], 1.0).prod(-1)[sampled]
    assert mean_weight(BASE, "token_is").item() == pytest.approx(mass[0].item(), abs=1e-14)
    assert mean_weight(BASE, "sequence_is").item() == pytest.approx((weights * per_sequence).sum().item(), abs=1e-14)
    moved = BASE + 0.3 * DIRECTION
    replayed = torch.where(kept, moved, -torch.inf)
    assert mean_weight(replayed, "token_is").item() == pytest.approx(1, abs=1e-14)
    assert mean_weight(replayed, "sequence_is").item() == pytest.approx(1, abs=1e-14)
    assert mean_weight(moved, "sequence_is").item() < 0.9


def test_t10_with_the_sampling_mask_the_gradient_is_that_of_the_truncated_policy() -> None:
    kept = _top_p(BASE, 0.8)
    behaviour = logprobs(torch.where(kept, BASE, -torch.inf), ALL)
    sampled = probabilities(behaviour) > 0
    weights = probabilities(behaviour)[sampled]
    logits = (BASE + 0.3 * DIRECTION).requires_grad_()
    replayed = logprobs(torch.where(kept, logits, -torch.inf), ALL)[sampled]
    mask, rewards = ALL.mask[sampled], REWARDS[sampled]

    def gradient(current: Tensor, rollout: Tensor) -> Tensor:
        x = LossInputs(current, current.detach(), rollout, weights * rewards, mask)
        loss = resolve(ObjectiveConfig(**EXACT)).loss(x, Denominators(1, 1, 1)).loss
        return -torch.autograd.grad(loss, logits, retain_graph=True)[0]

    truth = torch.autograd.grad((replayed.sum(-1).exp() * rewards).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient(replayed, behaviour[sampled]), truth, rtol=0, atol=1e-14)
    # Scored by the whole softmax on both sides the ratio's mean is near 1 and the gradient is still wrong.
    whole = logprobs(logits, ALL)[sampled]
    wrong = gradient(whole, MU[sampled])
    assert (wrong - truth).norm() > 0.1 * truth.norm()
