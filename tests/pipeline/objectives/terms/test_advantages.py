from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.objectives.terms.advantages import (
    gae,
    group_mean,
    group_std,
    leave_one_out,
    returns_to_go,
    token_rewards,
    whiten,
)

REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 3.0, 0.25], dtype=torch.float64)
GROUPS = torch.tensor([7, 3, 7, 3, 3, 7, 7])
"""Groups of four and of three, not in order."""


def _by_group(rewards: Tensor, groups: Tensor, formula) -> Tensor:
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        out[groups == group] = formula(rewards[groups == group])
    return out


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (group_mean, lambda r: r - r.mean()),
        (lambda r, g: group_std(r, g, epsilon=1e-6), lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-6)),
        (leave_one_out, lambda r: r - (r.sum() - r) / (len(r) - 1)),
    ],
    ids=["mean", "std", "leave-one-out"],
)
def test_group_advantages_are_their_formula_for_groups_of_unequal_size(function, formula) -> None:
    torch.testing.assert_close(function(REWARDS, GROUPS), _by_group(REWARDS, GROUPS, formula), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", [group_mean, group_std, leave_one_out])
def test_equal_rewards_have_advantage_zero_exactly_in_float32(function) -> None:
    """The float32 mean of seven times 0.1 is not 0.1; divided by a std of 0 + 1e-6 its error would be an advantage."""
    rewards = torch.full((7,), 0.1)
    assert rewards.mean() != rewards[0]
    assert function(rewards, torch.zeros(7, dtype=torch.int64)).abs().max() == 0


def test_leave_one_out_refuses_a_group_of_one_by_name() -> None:
    with pytest.raises(ValueError, match="group 9 has one"):
        leave_one_out(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 9, 4]))


def test_a_group_of_one_has_no_advantage_over_itself() -> None:
    assert group_std(torch.tensor([3.0]), torch.tensor([0])).item() == 0.0


def test_whitening_counts_every_token_once() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    per_sequence = torch.tensor([1.0, -2.0, 100.0, 0.5], dtype=torch.float64)
    repeated = per_sequence[:, None].expand(4, 4)
    tokens = repeated[mask]
    expected = (per_sequence - tokens.mean()) / (tokens.std(correction=0) + 1e-6)
    out = whiten(per_sequence, mask)
    torch.testing.assert_close(out[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-13, atol=0)
    assert out[2] == 0.0
    torch.testing.assert_close(whiten(repeated, mask), out[:, None] * mask, rtol=1e-13, atol=0)


def test_whitening_equal_advantages_gives_zero() -> None:
    assert whiten(torch.full((3,), 0.1), torch.ones(3, 5, dtype=torch.bool)).abs().max() == 0.0


def test_the_reward_stands_on_the_last_token_and_an_empty_sequence_has_none() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    penalty = torch.full((3, 3), 0.25)
    out = token_rewards(torch.tensor([1.0, 5.0, 2.0]), mask, penalty)
    assert out.tolist() == [[-0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [-0.25, -0.25, 1.75]]
    assert returns_to_go(out, mask).tolist() == [[0.5, 0.75, 0.0], [0.0, 0.0, 0.0], [1.25, 1.5, 1.75]]


def _gae_by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[float]:
    """sum_k (gamma lam)^k delta_{t+k}, for one sequence without padding."""
    n = len(rewards)
    after = [*values[1:].tolist(), 0.0]
    deltas = [rewards[t].item() + gamma * after[t] - values[t].item() for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition_and_steps_over_masked_tokens(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    values = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    rewards = torch.randn(3, 5, generator=generator, dtype=torch.float64) * mask
    values[~mask] = math.nan  # never read
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for s in range(3):
        expected = _gae_by_definition(rewards[s][mask[s]], values[s][mask[s]], gamma, lam)
        assert advantages[s][mask[s]].tolist() == pytest.approx(expected, rel=1e-12)
        assert (returns - advantages)[s][mask[s]].tolist() == pytest.approx(values[s][mask[s]].tolist(), rel=1e-12)
    assert advantages[~mask].abs().max() == 0
    assert returns[~mask].abs().max() == 0


def test_gae_with_gamma_and_lambda_one_is_reward_minus_value() -> None:
    values = torch.tensor([[0.3, -0.1, 0.7]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    dense = token_rewards(torch.tensor([2.0], dtype=torch.float64), mask)
    advantages, _ = gae(dense, values, mask, 1.0, 1.0)
    assert advantages[0].tolist() == pytest.approx([1.7, 2.1, 1.3], rel=1e-14)


# Through an objective


MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
FOUR = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
PAIRS = torch.tensor([0, 0, 1, 1])


def test_a_kl_in_the_reward_of_a_group_advantage_is_subtracted_before_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    proximal, reference = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    config = ObjectiveConfig(preset="dr_grpo", kl={"estimator": "k1", "beta": 0.5, "place": "reward"})
    out = resolve(config).advantages(FOUR, PAIRS, MASK, proximal_logprobs=proximal, reference_logprobs=reference)
    penalised = FOUR - 0.5 * ((proximal - reference) * MASK).sum(-1)
    torch.testing.assert_close(out.advantages, group_mean(penalised, PAIRS), rtol=1e-13, atol=1e-15)


def test_reinforce_plus_plus_whitens_reward_minus_the_kl_still_to_come() -> None:
    generator = torch.Generator().manual_seed(2)
    proximal, reference = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    out = resolve(ObjectiveConfig(preset="reinforce_plus_plus")).advantages(
        FOUR, PAIRS, MASK, proximal_logprobs=proximal, reference_logprobs=reference
    )
    kl = 0.01 * (proximal - reference) * MASK
    raw = torch.stack([FOUR[i] - kl[i].flip(-1).cumsum(-1).flip(-1) for i in range(4)])
    tokens = raw[MASK]
    expected = (raw - tokens.mean()) / (tokens.std(correction=0) + 1e-6) * MASK
    torch.testing.assert_close(out.advantages, expected, rtol=1e-12, atol=1e-14)


def test_ppo_returns_advantages_and_the_critics_targets() -> None:
    values = torch.full((4, 3), 0.25, dtype=torch.float64)
    out = resolve(ObjectiveConfig(preset="ppo")).advantages(FOUR, PAIRS, MASK, values=values)
    advantages, returns = gae(token_rewards(FOUR, MASK), values, MASK, 1.0, 0.95)
    assert out.returns is not None
    torch.testing.assert_close(out.advantages, advantages)
    torch.testing.assert_close(out.returns, returns)


def test_areals_advantage_is_the_group_std_whitened_again_over_tokens() -> None:
    out = resolve(ObjectiveConfig(preset="areal_grpo")).advantages(FOUR, PAIRS, MASK)
    expected = whiten(group_std(FOUR, PAIRS, 1e-5, "sample"), MASK, 1e-5, "sample")
    torch.testing.assert_close(out.advantages, expected)


@pytest.mark.parametrize(
    ("preset", "sentence"),
    [("ppo", "pass values"), ("reinforce_plus_plus", "needs proximal_logprobs and reference_logprobs")],
)
def test_a_missing_input_is_named(preset: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve(ObjectiveConfig(preset=preset)).advantages(FOUR, PAIRS, MASK)


def test_a_reward_that_is_not_a_number_names_its_sequence() -> None:
    rewards = FOUR.clone()
    rewards[2] = math.nan
    with pytest.raises(ValueError, match="the reward is nan in sequence 2"):
        resolve(ObjectiveConfig()).advantages(rewards, PAIRS, MASK)
