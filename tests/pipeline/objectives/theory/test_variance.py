"""T4: the variance of a sequence's weight against its length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.enumeration import logprobs, probabilities, tree, weighted_variance


def _variances(mu: Tensor, pi: Tensor, length: int) -> tuple[float, float, float]:
    """Var of t, g1 and s~ for `length` tokens drawn alike: exact, from moments of one token."""
    ratio = pi / mu

    def moment(power: float) -> Tensor:
        return (mu * ratio**power).sum()

    product = moment(2) ** length - 1
    total = length * (moment(2) - 1)
    geometric = length**2 * (moment(2 / length) ** length - moment(1 / length) ** (2 * length))
    return product.item(), total.item(), geometric.item()


MU_TOKEN = torch.tensor([0.05, 0.45, 0.5], dtype=torch.float64)
RARE_TOKEN_GAINS = torch.tensor([0.08, 0.44, 0.48], dtype=torch.float64)
RARE_TOKEN_LOSES = 2 * MU_TOKEN - RARE_TOKEN_GAINS
"""delta of the opposite sign: the same sigma^2, the opposite skew."""


def test_t4_the_closed_forms_are_the_enumerated_variances() -> None:
    fixed = tree(vocabulary=3, length=6, stop=False)
    for pi in (RARE_TOKEN_GAINS, RARE_TOKEN_LOSES):
        mu_all = logprobs(MU_TOKEN.log().expand(fixed.rows, 3), fixed)
        log_r = logprobs(pi.log().expand(fixed.rows, 3), fixed) - mu_all
        values = (log_r.sum(-1).exp(), 1 + log_r.expm1().sum(-1), 1 + 6 * ((log_r.sum(-1) / 6).exp() - 1))
        enumerated = [weighted_variance(value, probabilities(mu_all)).item() for value in values]
        assert enumerated == pytest.approx(_variances(MU_TOKEN, pi, 6), rel=1e-11)


def test_t4_variance_of_the_product_is_exponential_and_of_the_sum_linear_in_length() -> None:
    sigma2 = (RARE_TOKEN_GAINS**2 / MU_TOKEN).sum().item() - 1
    for length in (1, 6, 64, 1024):
        product, total, _ = _variances(MU_TOKEN, RARE_TOKEN_GAINS, length)
        assert product == pytest.approx((1 + sigma2) ** length - 1, rel=1e-9)
        assert total == pytest.approx(length * sigma2, rel=1e-12)


def test_t4_the_geometric_mean_has_less_variance_only_where_delta_is_skewed_to_the_right() -> None:
    for length in (6, 64, 1024):
        _, total, geometric = _variances(MU_TOKEN, RARE_TOKEN_GAINS, length)
        _, same_total, larger = _variances(MU_TOKEN, RARE_TOKEN_LOSES, length)
        assert same_total == pytest.approx(total, rel=1e-12)
        assert geometric < 0.7 * total
        assert larger > 1.9 * total


def test_t4_the_difference_is_minus_the_third_moment_to_lowest_order() -> None:
    """Var(s~) = N sigma^2 - (N - 1) E[delta^3] + O(delta^4)."""
    delta, scale = RARE_TOKEN_GAINS / MU_TOKEN - 1, 3e-3
    third = (MU_TOKEN * (scale * delta) ** 3).sum().item()
    for length in (2, 6, 64):
        differences = []
        for sign in (1, -1):
            _, total, geometric = _variances(MU_TOKEN, MU_TOKEN * (1 + sign * scale * delta), length)
            differences.append(geometric - total)
        odd_part = (differences[0] - differences[1]) / 2  # the fourth order is even in delta
        assert odd_part / (-(length - 1) * third) == pytest.approx(1, abs=0.01)


def test_t4_a_sampled_token_that_pi_thinks_impossible_costs_the_geometric_mean_most() -> None:
    pi = torch.tensor([0.001, 0.474, 0.525], dtype=torch.float64)
    _, total, geometric = _variances(MU_TOKEN, pi, 64)
    assert geometric > 10 * total


def test_t4_gaussian_logit_noise_goes_both_ways_and_a_large_vocabulary_favours_the_geometric_mean() -> None:
    """The share of draws in which the geometric mean has more variance: about half at V = 3, few at V = 256."""
    generator = torch.Generator().manual_seed(1)

    def share(vocabulary: int, noise: float, draws: int = 300) -> float:
        worse = 0
        for _ in range(draws):
            logits = 1.5 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
            moved = logits + noise * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
            _, total, geometric = _variances(logits.softmax(0), moved.softmax(0), 64)
            worse += geometric > total
        return worse / draws

    assert 0.4 < share(3, 0.2) < 0.6
    assert share(256, 0.5) < 0.1
