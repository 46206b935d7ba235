"""T1 to T3 and T9: what the mean of an objective's gradient is, and how far from the true one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.objectives import Denominators, LossInputs, ObjectiveConfig, resolve
from tests.pipeline.objectives.theory.policy import (
    ALL,
    BASE,
    DIRECTION,
    DR_GSPO,
    EXACT,
    GRPO_SUM,
    MU,
    REWARDS,
    UNCLIPPED,
    N,
    P,
    mean_gradient,
    ratios,
    slopes,
)
from tests.support.enumeration import gradient_of_mean, logprobs, probabilities


def test_enumeration_is_complete() -> None:
    assert len(ALL.tokens) == sum(2 ** (n - 1) for n in range(1, 7)) + 2**6 == 127
    assert P.sum().item() == pytest.approx(1, abs=1e-14)


# T1


def test_t1_sequence_importance_sampling_has_the_gradient_of_the_expected_reward() -> None:
    logits = BASE + 0.5 * DIRECTION
    gradient = mean_gradient(EXACT, 0.5, REWARDS)
    h = 1e-5
    for row in range(0, ALL.rows, 5):
        for token in range(3):
            step = torch.zeros_like(logits)
            step[row, token] = h
            up, down = ((probabilities(logprobs(logits + sign * step, ALL)) * REWARDS).sum() for sign in (1, -1))
            assert ((up - down) / (2 * h)).item() == pytest.approx(gradient[row, token].item(), abs=1e-9)
    torch.testing.assert_close(gradient, gradient_of_mean(REWARDS, logits, ALL), rtol=0, atol=1e-15)


# T2


def _objective_change(config: dict, delta: float) -> float:
    """J_surrogate(delta) - J_surrogate(0), its mean over mu; A scaled by a probability scales the term."""
    objective = resolve(ObjectiveConfig(**config))

    def value(d: float) -> Tensor:
        current = logprobs(BASE + d * DIRECTION, ALL)
        return -objective.loss(LossInputs(current, MU, MU, P * REWARDS, ALL.mask), Denominators(1, 1, 1)).loss

    return (value(delta) - value(0.0)).item()


@pytest.mark.parametrize(
    ("config", "second_order"),
    [
        # t - g1 = sum_{i<j} delta_i delta_j;  t - s~ = (1/2)(1 - 1/N)(sum delta)^2, to second order
        (GRPO_SUM, lambda d: 0.5 * (d.sum(-1).square() - d.square().sum(-1))),
        (DR_GSPO, lambda d: 0.5 * (1 - 1 / N) * d.sum(-1).square()),
    ],
    ids=["grpo-sum", "dr-gspo"],
)
def test_t2_objective_error_is_second_order_and_gradient_error_first(config: dict, second_order) -> None:
    deltas = [0.02, 0.01, 0.005, 0.0025]
    objective_errors, gradient_errors = [], []
    for delta in deltas:
        logits = BASE + delta * DIRECTION
        true_change = ((probabilities(logprobs(logits, ALL)) - P) * REWARDS).sum().item()
        objective_errors.append(true_change - _objective_change(config, delta))
        gradient_errors.append((gradient_of_mean(REWARDS, logits, ALL) - mean_gradient(config, delta, REWARDS)).norm())
    assert slopes(objective_errors)[-1] == pytest.approx(2, abs=0.01)
    assert slopes(gradient_errors)[-1] == pytest.approx(1, abs=0.01)
    tiny = 1e-5
    first = ratios(tiny)[0] / tiny
    leading = (P * REWARDS * second_order(first)).sum().item()
    assert objective_errors[-1] / deltas[-1] ** 2 == pytest.approx(leading, rel=0.02)


# T3


def test_t3_delta_has_mean_zero_under_every_prefix_and_its_log_has_mean_minus_kl() -> None:
    mu, pi = BASE.softmax(-1), (BASE + 0.3 * DIRECTION).softmax(-1)
    delta = pi / mu - 1
    assert (mu * delta).sum(-1).abs().max() < 1e-15
    kl = (mu * (mu / pi).log()).sum(-1)
    torch.testing.assert_close((mu * delta.log1p()).sum(-1), -kl, rtol=1e-12, atol=1e-16)
    assert kl.min() > 0


def test_t3_g1_and_the_true_ratio_have_the_same_mean() -> None:
    _, t, g1, geometric = ratios(0.3)
    assert (P * t).sum().item() == pytest.approx(1, abs=1e-14)
    assert (P * (g1 - t)).sum().abs() < 1e-14
    assert (P * (geometric - t)).sum() < -1e-2  # the geometric one is biased


def test_t3_identity_3_and_what_the_tutorial_leaves_out() -> None:
    remainders, omitted = [], []
    for delta in (0.02, 0.01, 0.005):
        d, t, _, geometric = ratios(delta)
        squared = d.sum(-1).square()
        remainders.append((t - geometric - 0.5 * (1 - 1 / N) * squared).abs().max().item())
        # the tutorial: sum_{i<j} delta_i delta_j + (1/2) sum delta^2, which is (1/2)(sum delta)^2
        pairs = 0.5 * (squared - d.square().sum(-1))
        left = t - geometric - (pairs + 0.5 * d.square().sum(-1))
        omitted.append(((left + squared / (2 * N)).abs().max() / left.abs().max()).item())
    assert slopes(remainders)[-1] == pytest.approx(3, abs=0.05)
    assert omitted[-1] < 0.05  # what is left over is -(sum delta)^2 / (2 N), to second order


# T9


def test_t9_what_a_constant_reward_still_teaches() -> None:
    """||E_mu[b score]|| with b = 1 and pi = mu moved by 0.3: zero where the weight is a true ratio."""
    ones = torch.ones_like(REWARDS)

    def size(config: dict, proximal: Tensor = MU) -> float:
        return mean_gradient(config, 0.3, ones, proximal).norm().item()

    current = logprobs(BASE + 0.3 * DIRECTION, ALL)
    truncated = {"preset": "reinforce", "correction": {"kind": "token_tis", "high": 1.2, "numerator": "current"}}
    assert size(EXACT) < 1e-15
    assert size({"preset": "reinforce"}) < 1e-15
    assert size(GRPO_SUM) < 1e-15
    assert size(truncated) == pytest.approx(0.01694, abs=1e-5)
    assert size(DR_GSPO) == pytest.approx(0.07410, abs=1e-5)
    assert size({"preset": "reinforce", "correction": []}, proximal=current) == pytest.approx(0.10467, abs=1e-5)
    assert size({"preset": "grpo", **UNCLIPPED}) == pytest.approx(0.08219, abs=1e-5)


def test_t9_only_dividing_by_length_still_teaches_on_policy() -> None:
    """As delta goes to 0 no importance sampling and Dr.GSPO go to 0 with it; GRPO goes to ||grad E[1/N]||."""
    ones = torch.ones_like(REWARDS)

    def size(config: dict, delta: float) -> float:
        return mean_gradient(config, delta, ones).norm().item()

    assert slopes([size(DR_GSPO, delta) for delta in (0.02, 0.01, 0.005)])[-1] == pytest.approx(1, abs=0.02)
    per_token = gradient_of_mean(1 / N, BASE, ALL).norm().item()
    assert size({"preset": "grpo", **UNCLIPPED}, 1e-6) == pytest.approx(per_token, rel=1e-4)
