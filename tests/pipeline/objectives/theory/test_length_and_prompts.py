"""T5 and T6: what 1/N does to lengths, and the std to prompts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.objectives.terms.advantages import group_std
from tests.pipeline.objectives.theory.policy import ALL, BASE, REWARDS, UNCLIPPED, N, mean_gradient
from tests.support.enumeration import gradient_of_mean

# T5


@pytest.mark.parametrize("baseline", [0.0, 1.0, -3.0])
def test_t5_dividing_by_length_on_policy_is_the_gradient_of_reward_per_token(baseline: float) -> None:
    gradient = mean_gradient({"preset": "grpo", **UNCLIPPED}, 0.0, REWARDS - baseline)
    torch.testing.assert_close(gradient, gradient_of_mean((REWARDS - baseline) / N, BASE, ALL), rtol=0, atol=1e-15)


def test_t5_the_baseline_is_free_without_1_over_n_and_not_with_it() -> None:
    ones = torch.ones_like(REWARDS)
    assert mean_gradient({"preset": "dr_grpo", **UNCLIPPED}, 0.0, ones).norm() < 1e-15
    free = mean_gradient({"preset": "grpo", **UNCLIPPED}, 0.0, ones)
    torch.testing.assert_close(free, gradient_of_mean(1 / N, BASE, ALL), rtol=0, atol=1e-15)
    assert free.norm() > 0.05


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "gmpo"])
def test_t5_with_1_over_n_right_answers_get_shorter_and_wrong_ones_longer(name: str) -> None:
    """A > 0 everywhere: the mean length falls along the gradient; A < 0: it grows, at the same rate."""
    longer = gradient_of_mean(N, BASE, ALL)
    right = (mean_gradient({"preset": name}, 0.0, torch.ones_like(N)) * longer).sum().item()
    wrong = (mean_gradient({"preset": name}, 0.0, -torch.ones_like(N)) * longer).sum().item()
    assert right < -0.01
    assert wrong == pytest.approx(-right, rel=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "reinforce",
        "dr_grpo",
        "dapo",
        "dr_gspo",
        "cispo",
        "minirl",
        "dppo_tv",
        "ipo",
        "vespo",
        "luspo",
        "icepop",
        "m2po",
        "scalerl",
        "areal_grpo",
        "areal_gspo",
    ],
)
def test_t5_without_1_over_n_an_equal_advantage_moves_nothing(name: str) -> None:
    assert mean_gradient({"preset": name}, 0.0, torch.ones_like(N)).norm() < 1e-15


# T6


def _weight_of_prompt(p: float, group: int) -> float:
    """c_G(p) = E_k sqrt(k (G - k)) / (G p (1 - p)), k ~ Bin(G, p)."""
    mean = sum(
        math.comb(group, k) * p**k * (1 - p) ** (group - k) * math.sqrt(k * (group - k)) for k in range(group + 1)
    )
    return mean / (group * p * (1 - p))


def _direction(rewards: Tensor, p: float) -> Tensor:
    """What multiplies grad p in (1/G) sum_i A_i score_i, the mean scores of right and wrong answers put in. [groups]"""
    ids = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    informative = (rewards != rewards[:, :1]).any(1, keepdim=True)  # 0/0 where all rewards of a group are equal
    advantages = torch.where(informative, group_std(rewards.flatten(), ids, epsilon=0.0).view_as(rewards), 0.0)
    return (advantages * torch.where(rewards > 0, 1 / p, -1 / (1 - p))).mean(-1)


@pytest.mark.parametrize(("p", "expected"), [(0.05, 2.47), (0.5, 1.86)])
def test_t6_the_numbers_of_the_closed_form(p: float, expected: float) -> None:
    assert _weight_of_prompt(p, 8) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("group", [2, 8])
def test_t6_the_std_multiplies_a_prompts_gradient_by_c_g(p: float, group: int) -> None:
    k = torch.arange(group + 1)
    rewards = (torch.arange(group)[None] < k[:, None]).double()
    binomial = torch.tensor([math.comb(group, int(i)) * p ** int(i) * (1 - p) ** (group - int(i)) for i in k]).double()
    exact = (binomial * _direction(rewards, p)).sum().item()
    assert exact == pytest.approx(_weight_of_prompt(p, group), rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    drawn = _direction((torch.rand(40_000, group, generator=generator, dtype=torch.float64) < p).double(), p)
    error = drawn.std().item() / math.sqrt(len(drawn))
    assert drawn.mean().item() == pytest.approx(_weight_of_prompt(p, group), abs=4 * error)


def test_t6_however_hard_the_prompt_the_weight_stays_below_sqrt_of_g_minus_1() -> None:
    """1/sqrt(p(1-p)), the weight by the true std, is 100 at p = 1e-4; a group of 8 gives 2.6."""
    for group in (2, 8, 64):
        assert _weight_of_prompt(1e-6, group) == pytest.approx(math.sqrt(group - 1), rel=1e-3)
        assert _weight_of_prompt(0.01, group) < math.sqrt(group - 1) + 1e-12
