"""The page of the tutorial's exercise says what its script computes, whose closed forms are sums over everything."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pipeline.objectives.terms.advantages import group_mean, whiten
from scripts import exercise
from tests.support.enumeration import gradient_of_mean, logprobs, probabilities, tree, weighted_variance

PAGE = Path("docs/exercise.md").read_text()


@pytest.mark.parametrize("name", exercise.TABLES)
def test_the_page_has_the_tables_of_the_script(name: str) -> None:
    assert "\n".join(exercise.TABLES[name]()) in PAGE


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_errors_and_variances_are_sums_over_every_sequence(sign: float, length: int) -> None:
    mu, ratio = exercise.token(sign, sigma2=0.05)
    sequences = tree(vocabulary=3, length=length, stop=False)
    at = logprobs(mu.log().expand(sequences.rows, 3), sequences)
    log_r = logprobs((mu * ratio).log().expand(sequences.rows, 3), sequences) - at
    p = probabilities(at)
    t, g1 = log_r.sum(-1).exp(), 1 + log_r.expm1().sum(-1)
    s = 1 + length * ((log_r.sum(-1) / length).exp() - 1)
    expected = {
        "variance_g1": weighted_variance(g1, p),
        "variance_s": weighted_variance(s, p),
        "bias_s": (p * (t - s)).sum(),
        "rms_g1": (p * (t - g1).square()).sum().sqrt(),
        "rms_s": (p * (t - s).square()).sum().sqrt(),
    }
    found = exercise.estimators(mu, ratio, length)
    assert found == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-9, abs=1e-7)
    assert (p * (t - g1)).sum().item() == pytest.approx(0, abs=1e-14)
    assert (t - s).min() > -1e-14  # t - s~ is never negative: Bernoulli's inequality


@pytest.mark.parametrize("length", [2, 8, 64])
def test_to_lowest_order_the_errors_are_those_of_the_page(length: int) -> None:
    sigma2 = 1e-7
    for sign in (1.0, -1.0):
        e = exercise.estimators(*exercise.token(sign, sigma2), length)
        assert e["bias_s"] == pytest.approx((length - 1) * sigma2 / 2, rel=5e-3)
    # Both signs together, so that what is odd in delta cancels; the mean squares in exact fractions of sigma^4.
    fourth = float((exercise.RARE * (exercise.token(1.0, 1.0)[1] - 1) ** 4).sum())
    e = exercise.estimators(*exercise.token(1.0, 1e-4), length)
    other = exercise.estimators(*exercise.token(-1.0, 1e-4), length)
    pairs = length * (length - 1) / 2
    assert (e["rms_g1"] ** 2 + other["rms_g1"] ** 2) / 2 / 1e-8 == pytest.approx(pairs, rel=0.02)
    square = (length * fourth + 6 * pairs) * (1 - 1 / length) ** 2 / 4
    assert (e["rms_s"] ** 2 + other["rms_s"] ** 2) / 2 / 1e-8 == pytest.approx(square, rel=0.02)


def test_a_mean_over_the_tokens_of_a_batch_teaches_length_as_1_over_n_does_and_less_in_larger_batches() -> None:
    norms = [[float(x) for x in row.split("|")[2:-1]] for row in exercise.per_length()[2:]]
    per_answer, per_batch, constant = norms
    assert per_answer[0] == per_batch[0] > 0.05
    assert per_answer == [per_answer[0]] * 4
    assert all(1.8 < per_batch[0] / x * 2 / (k + 2) < 5.5 for k, x in enumerate(per_batch[1:]))
    assert constant == [0] * 4
    logits, _ = exercise.small_policy()
    expected = gradient_of_mean(1 / exercise.SMALL.lengths, logits, exercise.SMALL).norm().item()
    assert per_answer[0] == pytest.approx(expected, abs=5e-5)


def test_the_expected_advantage_is_0_whatever_the_policy_and_its_gradient_that_of_the_reward() -> None:
    logits, p = exercise.small_policy()
    for rewards in exercise.rewards_of_prompts():
        advantage = rewards - (p * rewards).sum()
        assert (p * advantage).sum().abs() < 1e-15
        held = gradient_of_mean(advantage, logits, exercise.SMALL)
        torch.testing.assert_close(held, gradient_of_mean(rewards, logits, exercise.SMALL), rtol=0, atol=1e-15)


def test_batches_by_class_are_batches_of_answers() -> None:
    """Two prompts of two answers each, whitened, over all quadruples of sequences."""
    logits, p, grads = exercise.short_policy()
    rewards, masks = exercise.short_rewards(), exercise.SHORT.mask
    total = torch.zeros(4, grads.shape[1], dtype=torch.float64)
    for batch in itertools.product(range(len(p)), repeat=4):
        chosen = torch.tensor(batch)
        R = rewards[torch.tensor([0, 0, 1, 1]), chosen]
        A = whiten(group_mean(R, torch.tensor([0, 0, 1, 1])), masks[chosen])
        total += p[chosen].prod() * A[:, None] * grads[chosen]
    found = exercise.batch_directions(group=2)["R - mean, whitened"]
    torch.testing.assert_close(found, total.view(2, 2, -1).mean(1), rtol=0, atol=1e-13)
    plain = exercise.batch_directions()["R - mean of the others"]
    for part, reward in zip(plain, rewards, strict=True):
        truth = gradient_of_mean(reward, logits, exercise.SHORT).flatten()
        torch.testing.assert_close(part, truth, rtol=0, atol=1e-14)


def numbers(rows: list[str], column: int) -> list[float]:
    return [float(row.split("|")[column]) for row in rows[2:]]


def test_what_the_page_says_in_words_is_in_its_tables() -> None:
    words = " ".join(PAGE.split())
    rows = exercise.errors()
    g1, s, var_g1, var_s = (numbers(rows, column) for column in (4, 5, 6, 7))
    worse = [b / a for a, b in zip(g1, s, strict=True)]
    assert f"The error is larger, by {min(worse):.1f} to {max(worse):.1f} times here" in words
    variance = [b / a for a, b in zip(var_g1, var_s, strict=True)]
    right, left = variance[:4], variance[4:]
    low, high = f"{min(right):.2f}".lstrip("0"), f"{max(right):.2f}".lstrip("0")
    assert (
        f"The variance is {low} to {high} of Dr.GRPO's for one skew and {min(left):.2f} to {max(left):.2f} of it"
        in words
    )
    none, overall, prompt, best = numbers(exercise.total_variance(), 4)
    assert (
        f"takes {1 - overall / none:.0%} of the gradient's away, and E[R | x] takes {1 - prompt / none:.0%}".replace(
            "%", " %"
        )
        in words
    )
    assert f"is {1 - best / prompt:.1%} better".replace("%", " %") in words
    chances = [round(100 * float((r * exercise.small_policy()[1]).sum())) for r in exercise.rewards_of_prompts()]
    assert f"prompts solved {chances[0]}, {chances[1]} and {chances[2]} % of the time" in words
    hard, easy, off = (numbers(exercise.normalisation(), column)[-1] for column in (2, 3, 4))
    assert f"the easy prompt weighs {easy / hard:.1f} times the hard one" in words
    assert f"no longer points where it should, by {100 * off:.1f} %" in words
