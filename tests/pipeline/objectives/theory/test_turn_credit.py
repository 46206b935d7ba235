"""What the mean of a gradient with credit by turns is: exactly, over all conversations of a small policy.

Two tokens are a turn, and between turns stands a token that nobody sampled. Groups of two are all pairs of
conversations, each with its probability.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.objectives import ObjectiveConfig, Turns, resolve
from tests.support.enumeration import Tree, coefficients, expected_gradient, logprobs, probabilities, tree


class World:
    """All conversations of a policy, and the reward of each turn, which depends on all that was said before."""

    def __init__(self, *, stop: bool):
        """stop: token 0 ends a conversation; else all have two turns."""
        self.all: Tree = tree(3, 4, stop=stop)
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(self.all.rows, 3, generator=generator, dtype=torch.float64)
        self.turn = torch.where(self.all.mask, torch.arange(4)[None] // 2, -1)
        by_prefix = torch.randn(self.all.rows, 3, generator=generator, dtype=torch.float64)
        earned = torch.where(self.all.mask, by_prefix[self.all.prefixes, self.all.tokens], 0.0)
        self.rewards = torch.stack([earned[:, :2].sum(-1), earned[:, 2:].sum(-1)], 1)
        self.logprobs = logprobs(self.logits, self.all)
        self.p = probabilities(self.logprobs)

    def spread(self, matrix: Tensor, fill: float) -> Tensor:
        """[M, 4] -> [M, 5]: a token that nobody sampled stands between the turns."""
        return torch.cat([matrix[:, :2], torch.full_like(matrix[:, :1], fill), matrix[:, 2:]], 1)

    def gradient(self, by_turn: Tensor) -> Tensor:
        """sum_y p(y) sum_k by_turn[y, k] grad log pi(turn k), [rows, V]."""
        weight = torch.where(self.all.mask, by_turn.gather(1, self.turn.clamp(min=0)), 0.0)
        return expected_gradient(weight, self.p, self.logits, self.all)

    @property
    def true(self) -> Tensor:
        """grad E[sum_k r_k]."""
        return self.gradient(self.rewards.sum(-1, keepdim=True).expand(-1, 2))

    def mean_coefficients(self, pairs: bool, values: Tensor | None = None, **cells) -> Tensor:
        """[M, 4]: the mean of c_t over the other conversation of a pair; pairs: false where there is no other."""
        count = len(self.p)
        first = torch.arange(count).repeat_interleave(count) if pairs else torch.arange(count)
        rows = torch.stack([first, torch.arange(count).repeat(count)], 1).flatten() if pairs else first
        groups = torch.arange(len(first)).repeat_interleave(2) if pairs else torch.arange(count)
        objective = resolve(ObjectiveConfig(credit="turn", **cells))
        logps, turn = self.spread(self.logprobs, torch.nan)[rows], self.spread(self.turn, -1)[rows]
        extras = {} if values is None else {"values": self.spread(values, torch.nan)[rows]}
        turns = Turns(turn, self.rewards[rows])
        out = objective.advantages(self.rewards.sum(-1)[rows], groups, turn >= 0, turns=turns, **extras)
        critic = {} if values is None else {**extras, "returns": out.returns, "proximal_values": extras["values"]}
        c = coefficients(objective, logps, logps, logps, out.advantages, turn >= 0, **critic)
        c = torch.cat([c[:, :2], c[:, 3:]], 1)
        if not pairs:
            return c
        return (c[0::2].view(count, count, 4) * self.p[None, :, None]).sum(1)


def test_a_fixed_number_of_turns_has_the_gradient_of_the_expected_reward() -> None:
    world = World(stop=False)
    c = world.mean_coefficients(pairs=True, preset="reinforce", advantage="leave_one_out")
    found = expected_gradient(c, world.p, world.logits, world.all)
    torch.testing.assert_close(found, world.true, rtol=0, atol=1e-14)


def test_a_mean_that_has_the_answer_itself_in_it_gives_half_of_it_for_two() -> None:
    world = World(stop=False)
    c = world.mean_coefficients(pairs=True, preset="reinforce", advantage="group_mean")
    found = expected_gradient(c, world.p, world.logits, world.all)
    torch.testing.assert_close(2 * found, world.true, rtol=0, atol=1e-14)


def test_a_turn_weighs_by_how_likely_another_answer_gets_there() -> None:
    """What docs/objectives.md says of turns that few have: each turn's part of the gradient is right up to that."""
    world = World(stop=True)
    reached = [(world.p * (world.turn == k).any(-1)).sum() for k in range(2)]
    assert reached[0] == pytest.approx(1)
    assert 0.1 < reached[1] < 0.9
    earned = world.rewards.flip(-1).cumsum(-1).flip(-1)
    expected = world.gradient(earned * torch.stack(reached))
    c = world.mean_coefficients(pairs=True, preset="reinforce", advantage="leave_one_out")
    found = expected_gradient(c, world.p, world.logits, world.all)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert (found - world.true).norm() > 1e-3


def exact_values(world: World) -> Tensor:
    """[M, 4]: what is still earned on average from each token's prefix on, that of its own turn included."""
    values = torch.zeros(world.all.mask.shape, dtype=torch.float64)
    for t in range(4):
        for prefix in world.all.prefixes[:, t][world.all.mask[:, t]].unique():
            own = (world.all.prefixes[:, t] == prefix) & world.all.mask[:, t]
            left = world.rewards[:, t // 2 :].sum(-1)
            values[own, t] = (world.p * left)[own].sum() / world.p[own].sum()
    return values


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(("lam", "exact"), [(1.0, False), (0.0, True), (0.5, True)])
def test_gae_over_turns_has_the_gradient_of_the_expected_reward(stop: bool, lam: float, exact: bool) -> None:
    """With lambda 1 whatever the critic says, below 1 where it is right."""
    world = World(stop=stop)
    noise = torch.randn(world.all.rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = exact_values(world) if exact else noise[world.all.prefixes]
    cells = {"preset": "ppo", "gae_lambda": lam, "value_coefficient": 0.0}
    c = world.mean_coefficients(pairs=False, values=values, **cells)
    found = expected_gradient(c, world.p, world.logits, world.all)
    torch.testing.assert_close(found, world.true, rtol=0, atol=1e-13)


def test_credit_by_turns_varies_less_where_turns_have_their_own_rewards() -> None:
    world = World(stop=False)

    def spread_of(credit: str) -> float:
        c = torch.zeros(2, len(world.p), 4, dtype=torch.float64)
        whole = world.rewards.sum(-1, keepdim=True).expand(-1, 2)
        earned = world.rewards.flip(-1).cumsum(-1).flip(-1) if credit == "turn" else whole
        c = earned.gather(1, world.turn)
        logits = world.logits.clone().requires_grad_()
        lp = logprobs(logits, world.all)
        square = 0.0
        for i, weight in enumerate(world.p.tolist()):
            (gradient,) = torch.autograd.grad((c[i] * lp[i]).sum(), logits, retain_graph=True)
            square += weight * float(gradient.square().sum())
        return square - float(world.true.square().sum())

    assert spread_of("turn") < spread_of("episode")
