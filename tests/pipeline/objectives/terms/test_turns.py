"""Credit by turns against its equations in tests/support/plain.py, episode by episode, in float64.

Between, behind and before what is trained on stands nan, which is never read.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.objectives import Denominators, LossInputs, ObjectiveConfig, Turns, resolve
from tests.support import plain, plain_advantages

LENGTHS = [[2, 1, 3], [1], [2, 2], [1, 1, 1, 2], [3, 1], [1, 1], [2]]
"""Tokens of each turn of each episode."""
PROMPTS = [7, 3, 7, 3, 3, 7, 7]
EPISODES = len(LENGTHS)


def laid_out(lengths: list[list[int]], gap: int = 2) -> Tensor:
    """numbers [S, T]: `gap` untrained tokens before each turn but the first, and padding."""
    rows = []
    for own in lengths:
        row: list[int] = []
        for k, n in enumerate(own):
            row += [-1] * (gap if k else 0) + [k] * n
        rows.append(row)
    out = torch.full((len(rows), max(map(len, rows)) + 1), -1)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return out


NUMBERS = laid_out(LENGTHS)
MASK = NUMBERS >= 0


def matrix(seed: int, mask: Tensor = MASK) -> Tensor:
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.masked_fill(~mask, torch.nan)


PROXIMAL, REFERENCE, VALUES = matrix(0), matrix(1), matrix(2)
REWARDS = torch.randn(EPISODES, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
for _row, _own in zip(REWARDS, LENGTHS, strict=True):
    _row[len(_own) :] = 0
TURNS = Turns(NUMBERS, REWARDS)


def rewards_of(i: int) -> list[float]:
    return REWARDS[i, : len(LENGTHS[i])].tolist()


def advantages(turns: Turns = TURNS, **cells):
    return resolve(ObjectiveConfig(**{"credit": "turn"} | cells)).advantages(
        torch.full((EPISODES,), 9.0, dtype=torch.float64),  # not read: turns have the rewards
        torch.tensor(PROMPTS),
        turns.numbers >= 0,
        proximal_logprobs=PROXIMAL,
        reference_logprobs=REFERENCE,
        values=VALUES,
        turns=turns,
    )


def at_tokens(by_turn: list[list[float]]) -> list[list[float]]:
    return [
        [a for a, n in zip(own, lengths, strict=True) for _ in range(n)]
        for own, lengths in zip(by_turn, LENGTHS, strict=True)
    ]


def assert_tokens(found: Tensor, expected: list[list[float]]) -> None:
    for i, row in enumerate(expected):
        assert found[i][MASK[i]].tolist() == pytest.approx(row, rel=1e-11, abs=1e-13), i
    assert found[~MASK].abs().max() == 0


def penalties() -> list[list[list[float]]]:
    """0.3 k1 of each token of each turn."""
    out = []
    for i, lengths in enumerate(LENGTHS):
        own = (0.3 * (PROXIMAL - REFERENCE))[i][MASK[i]].split(lengths)
        out.append([part.tolist() for part in own])
    return out


KL = {"estimator": "k1", "beta": 0.3, "place": "reward"}


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("advantage", ["group_mean", "group_std", "leave_one_out"])
def test_a_groups_advantage_is_over_the_episodes_that_have_the_turn(advantage: str, kl: bool, gamma: float) -> None:
    rewards = [rewards_of(i) for i in range(EPISODES)]
    if kl:
        rewards = [[r - sum(p) for r, p in zip(*pair, strict=True)] for pair in zip(rewards, penalties(), strict=True)]
    earned = [plain_advantages.returns_by_turn(own, gamma) for own in rewards]
    expected = plain_advantages.over_turn(getattr(plain_advantages, advantage), earned, PROMPTS)
    found = advantages(preset="grpo", advantage=advantage, turn_gamma=gamma, **({"kl": KL} if kl else {}))
    assert_tokens(found.advantages, at_tokens(expected))
    assert expected[3][3] == 0.0  # no other has a fourth turn
    assert found.returns is None


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_batch_std_whitens_what_a_turn_and_those_after_it_earned_less_the_kl_still_to_come(gamma: float) -> None:
    rows = []
    for i, own in enumerate(penalties()):
        rewards = [r - sum(p) for r, p in zip(rewards_of(i), own, strict=True)]
        earned = [*plain_advantages.returns_by_turn(rewards, gamma), 0.0]
        row: list[float] = []
        for k, paid in enumerate(own):
            row += [rewards_of(i)[k] - sum(paid[t:]) + gamma * earned[k + 1] for t in range(len(paid))]
        rows.append(row)
    found = advantages(preset="reinforce_plus_plus", kl=KL, turn_gamma=gamma)
    assert_tokens(found.advantages, plain_advantages.whiten(rows))


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_takes_a_turn_as_one_step_and_its_value_where_it_begins(gamma: float, lam: float, kl: bool) -> None:
    found = advantages(preset="ppo", gae_gamma=gamma, gae_lambda=lam, **({"kl": KL} if kl else {}))
    expected, returns = [], []
    for i, lengths in enumerate(LENGTHS):
        paid = penalties()[i] if kl else [[0.0] * n for n in lengths]
        rewards = [r - sum(p) for r, p in zip(rewards_of(i), paid, strict=True)]
        begun = [part[0].item() for part in VALUES[i][MASK[i]].split(lengths)]
        own = plain_advantages.gae_by_turn(rewards, begun, gamma, lam)
        expected.append(own)
        returns.append([own[k] + begun[k] + sum(p[:t]) for k, p in enumerate(paid) for t in range(len(p))])
    assert_tokens(found.advantages, at_tokens(expected))
    assert found.returns is not None
    assert_tokens(found.returns, returns)


def test_only_the_value_where_a_turn_begins_is_read() -> None:
    others = VALUES.clone()
    others[~TURNS.first & MASK] += 5
    a, b = (
        resolve(ObjectiveConfig(preset="ppo", credit="turn")).advantages(
            torch.zeros(EPISODES), torch.tensor(PROMPTS), MASK, values=values, turns=TURNS
        )
        for values in (VALUES, others)
    )
    assert torch.equal(a.advantages, b.advantages)


@pytest.mark.parametrize("advantage", ["group_mean", "group_std", "leave_one_out", "batch_std"])
def test_one_turn_is_a_single_answer(advantage: str) -> None:
    numbers = torch.where(MASK, 0, -1)
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 3.0, 0.25], dtype=torch.float64)
    by_turn = advantages(Turns(numbers, rewards[:, None]), preset="grpo", advantage=advantage).advantages
    objective = resolve(ObjectiveConfig(preset="grpo", advantage=advantage))
    whole = objective.advantages(rewards, torch.tensor(PROMPTS), MASK).advantages
    torch.testing.assert_close(by_turn, whole[:, None] * MASK, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("advantage", ["group_mean", "group_std", "leave_one_out"])
def test_an_outcome_alone_in_episodes_of_as_many_turns_is_credit_by_episode(advantage: str) -> None:
    numbers = laid_out([[2, 1], [1, 1], [3, 2], [1, 4]])
    outcome = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    turns = Turns(numbers, torch.stack([torch.zeros_like(outcome), outcome], 1))
    groups = torch.tensor([0, 0, 1, 1])
    cells = {"preset": "grpo", "advantage": advantage}
    by_turn = resolve(ObjectiveConfig(**cells, credit="turn")).advantages(outcome, groups, numbers >= 0, turns=turns)
    whole = resolve(ObjectiveConfig(**cells)).advantages(outcome, groups, numbers >= 0)
    expected = whole.advantages[:, None] * (numbers >= 0)
    torch.testing.assert_close(by_turn.advantages, expected, rtol=1e-13, atol=1e-15)


def test_equal_returns_have_advantage_zero_exactly_in_float32() -> None:
    numbers = laid_out([[1, 1]] * 7)
    turns = Turns(numbers, torch.full((7, 2), 0.1))
    objective = resolve(ObjectiveConfig(preset="grpo", credit="turn"))
    out = objective.advantages(torch.zeros(7), torch.zeros(7, dtype=torch.int64), numbers >= 0, turns=turns)
    assert out.advantages.abs().max() == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4))
def test_loss_and_gradient_count_trained_tokens_wherever_others_stand(seed: int, gap: int) -> None:
    """The loss of conversations is the equation's of their trained tokens alone, each with its turn's advantage."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [
        torch.randint(1, 4, (int(torch.randint(1, 4, (1,), generator=generator)),), generator=generator).tolist()
        for _ in range(4)
    ]
    numbers = laid_out(lengths, gap)
    mask, prompts = numbers >= 0, [0, 0, 1, 1]
    rewards = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for row, own in zip(rewards, lengths, strict=True):
        row[len(own) :] = 0
    current, proximal, mu = (
        (-1 - torch.rand(mask.shape, generator=generator, dtype=torch.float64)).masked_fill(~mask, torch.nan)
        for _ in range(3)
    )
    current.requires_grad_()
    sizes = plain.Sizes(4, int(mask.sum()), 2, 9)
    for preset in ("grpo", "dapo", "dr_grpo", "cispo", "gspo_token"):
        objective = resolve(ObjectiveConfig(preset=preset, credit="turn"))
        out = objective.advantages(
            torch.zeros(4), torch.tensor(prompts), mask, turns=Turns(numbers, rewards)
        ).advantages
        counts = torch.tensor([sum(map(sum, lengths[:2]))] * 2 + [sum(map(sum, lengths[2:]))] * 2)
        x = LossInputs(current, proximal, mu, out, mask, prompt_tokens=counts)
        loss = objective.loss(x, Denominators(4, sizes.tokens, 9, prompts=2)).loss
        rule = plain_advantages.group_mean if preset == "dr_grpo" else plain_advantages.group_std
        earned = [
            plain_advantages.returns_by_turn(rewards[i, : len(own)].tolist(), 1.0) for i, own in enumerate(lengths)
        ]
        answers = []
        for i, own in enumerate(plain_advantages.over_turn(rule, earned, prompts)):
            A = torch.tensor([a for a, n in zip(own, lengths[i], strict=True) for _ in range(n)], dtype=torch.float64)
            rows = (matrix[i][mask[i]] for matrix in (current, proximal, mu))
            answers.append(plain.Answer(*rows, A, prompt_tokens=int(counts[i])))
        expected = plain.loss(preset, answers, sizes)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
        (gradient,), (theirs,) = torch.autograd.grad(loss, current), torch.autograd.grad(expected, current)
        torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-13)
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    objective = resolve(ObjectiveConfig(preset="rloo", credit="turn"))
    rewards, groups = torch.zeros(EPISODES), torch.tensor(PROMPTS)
    with pytest.raises(ValueError, match="gives credit by turns: pass turns"):
        objective.advantages(rewards, groups, MASK)
    with pytest.raises(ValueError, match="for each trained token, and for no other"):
        objective.advantages(rewards, groups, torch.ones_like(MASK), turns=TURNS)
    with pytest.raises(ValueError, match="a token is of turn 3 of 2"):
        Turns(NUMBERS, REWARDS[:, :2])
    with pytest.raises(ValueError, match="does not have has a reward"):
        Turns(NUMBERS, REWARDS + 1)
    with pytest.raises(ValueError, match="group 3 has one"):
        objective.advantages(rewards[:2], torch.tensor([3, 7]), MASK[:2], turns=Turns(NUMBERS[:2], REWARDS[:2]))
    broken = replace(TURNS, rewards=REWARDS.clone())
    broken.rewards[2, 1] = torch.nan
    with pytest.raises(ValueError, match="the reward is nan in sequence 2"):
        objective.advantages(rewards, groups, MASK, turns=broken)


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({"preset": "gspo", "credit": "turn"}, "write ratio: sequence_token"),
        ({"preset": "grpo", "turn_gamma": 0.9}, "write credit: turn too"),
        ({"preset": "ppo", "credit": "turn", "turn_gamma": 0.9}, "write gae_gamma: 0.9"),
        ({"preset": "grpo", "credit": "token"}, "'episode' or 'turn'"),
    ],
)
def test_what_does_not_go_together_says_what_to_write(cells: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ObjectiveConfig(**cells)
