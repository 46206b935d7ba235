"""What the mean gradient of the newer rows is, over every sequence of a small policy or every group of rewards."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.objectives.terms.advantages import batch_scaled, group_mean, mean_relative
from tests.pipeline.objectives.theory.policy import ALL, BASE, DIRECTION, MU, REWARDS, N, P, mean_gradient
from tests.support.enumeration import coefficients, gradient_of_mean, logprobs

ROWS = ("dppo_tv", "dppo_kl", "ipo", "vespo", "luspo", "icepop", "maxrl", "m2po", "reinforce_baseline", "scalerl")


@pytest.mark.parametrize("name", ROWS)
def test_on_policy_a_row_follows_the_gradient_of_the_expected_advantage(name: str) -> None:
    gradient = mean_gradient({"preset": name}, 0.0, REWARDS)
    torch.testing.assert_close(gradient, gradient_of_mean(REWARDS, BASE, ALL), rtol=0, atol=1e-15)


@pytest.mark.parametrize("p", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("group", [2, 4, 8, 64])
def test_maxrl_multiplies_a_prompts_gradient_by_that_of_log_p_cut_off_after_g_minus_1_terms(
    p: float, group: int
) -> None:
    """(1 - (1-p)^(G-1)) / p = sum_{k < G-1} (1-p)^k, the derivative of -sum_{k <= G-1} (1-p)^k / k; log p's is 1/p."""
    k = torch.arange(group + 1)
    rewards = (torch.arange(group)[None] < k[:, None]).double()
    ids = k.repeat_interleave(group)
    advantages = mean_relative(rewards.flatten(), ids).view_as(rewards)
    direction = (advantages * torch.where(rewards > 0, 1 / p, -1 / (1 - p))).mean(-1)
    chances = torch.tensor([math.comb(group, int(i)) * p ** int(i) * (1 - p) ** (group - int(i)) for i in k]).double()
    assert (chances * direction).sum().item() == pytest.approx((1 - (1 - p) ** (group - 1)) / p, rel=1e-6)


def test_a_group_whose_mean_is_not_above_0_teaches_maxrl_nothing() -> None:
    rewards, ids = torch.tensor([0.0, 0.0, -1.0, 0.5, 2.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert mean_relative(rewards, ids).tolist() == [0, 0, 0, 0, 1, -1]


def test_one_scale_of_the_batch_leaves_prompts_in_the_proportion_of_their_spread() -> None:
    rewards, ids = torch.tensor([4.0, 0.0, 1.0, 0.0, 1.0, 1.0]).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    scaled, centred = batch_scaled(rewards, ids, epsilon=0.0), group_mean(rewards, ids)
    torch.testing.assert_close(scaled / scaled[0], centred / centred[0])
    assert scaled.std(correction=0).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("sign", "slope"), [(1.0, -1.0), (-1.0, 1.0)])
def test_around_1_the_weight_of_vespo_moves_by_k_minus_lambda(sign: float, slope: float) -> None:
    """An exact weight moves by 1: where A > 0 VESPO's falls as an answer becomes likelier."""
    current = logprobs(BASE + 1e-6 * DIRECTION, ALL)
    A = torch.full_like(N, sign)
    weight = (coefficients(resolve(ObjectiveConfig(preset="vespo")), current, MU, MU, A, ALL.mask) / sign)[:, 0]
    moved = (current - MU).sum(-1).expm1()
    torch.testing.assert_close(weight - 1, slope * moved, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "bound"), [("dppo_tv", 0.15), ("ipo", 0.1)])
def test_a_trust_region_of_probability_drops_by_distance_and_a_ratio_by_rarity(name: str, bound: float) -> None:
    """Over the whole tree, pi moved by 1: what is kept is near, and rare tokens stay that a clip of .2 drops."""
    current, A = logprobs(BASE + DIRECTION, ALL), torch.ones_like(N)
    cells = {"kl": {"beta": 0}} if name == "ipo" else {}
    objective = resolve(ObjectiveConfig.model_validate({"preset": name, **cells}))
    c = coefficients(objective, current, MU, MU, A, ALL.mask)
    moved = (current.exp() - MU.exp())[ALL.mask]
    far = moved.abs() > bound if name == "ipo" else moved > bound
    assert torch.equal(c[ALL.mask] == 0, far)
    clipped = (current - MU).exp()[ALL.mask] > 1.2
    assert (clipped & ~far).any()
    assert far.any()


def test_a_product_leaves_the_gate_as_answers_grow() -> None:
    """The mean weight of one-sided rewards after a move of 1: what is far in sum weighs little."""
    current = logprobs(BASE + DIRECTION, ALL)
    A = torch.ones_like(N)
    weight = coefficients(resolve(ObjectiveConfig(preset="vespo")), current, MU, MU, A, ALL.mask)[:, 0]
    short, long = ((P * weight)[N <= 2].sum() / P[N <= 2].sum(), (P * weight)[N == 6].sum() / P[N == 6].sum())
    assert long < short
