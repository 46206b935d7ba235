"""pass@k and majority@k against enumeration of every subset, intervals against what they promise."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.estimates import interval, majority_at_k, pass_at_k


@given(st.integers(1, 10), st.data())
@settings(max_examples=200, deadline=None)
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_an_answer_that_passes(n, data):
    passed = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(passed, k))
    assert pass_at_k(n, sum(passed), k) == pytest.approx(
        float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-12
    )


def test_pass_at_k_is_unbiased_and_the_naive_estimate_is_not():
    n, k, p = 8, 4, 0.2
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance)) == pytest.approx(truth, abs=1e-12)
    naive = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert abs(naive - truth) > 0.02


def test_too_few_answers_have_no_pass_at_k():
    assert math.isnan(pass_at_k(3, 1, 4))
    assert math.isnan(majority_at_k(["a"], [True], 2))


def test_pass_at_k_of_many_answers_is_exact():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)


def enumerated(texts, right, k):
    """The share, with exact fractions: each subset's most frequent answers share its one vote."""
    total = Fraction(0)
    subsets = list(itertools.combinations(texts, k))
    for subset in subsets:
        counts = Counter(t for t in subset if t is not None)
        top = [t for t, c in counts.items() if c == max(counts.values())] if counts else []
        total += Fraction(sum(t == right for t in top), len(top)) if top else 0
    return float(total / len(subsets))


@given(st.lists(st.sampled_from(["72", "48", "7", None]), min_size=1, max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_majority_at_k_is_the_share_of_all_subsets_whose_commonest_answer_passes(texts, data):
    k = data.draw(st.integers(1, len(texts)))
    assert majority_at_k(texts, [t == "72" for t in texts], k) == pytest.approx(enumerated(texts, "72", k), abs=1e-12)


def test_majority_over_too_many_subsets_is_drawn_and_repeats():
    texts = ["72"] * 12 + ["48"] * 8 + [str(i) for i in range(12)]
    passed = [t == "72" for t in texts]
    found = majority_at_k(texts, passed, 16)
    assert found == majority_at_k(texts, passed, 16)
    rng = np.random.default_rng(3)
    drawn = [Counter(rng.choice(texts, 16, replace=False)) for _ in range(20_000)]
    truth = np.mean([(c["72"] == max(c.values())) / list(c.values()).count(max(c.values())) for c in drawn])
    assert found == pytest.approx(truth, abs=0.03)


def test_the_interval_holds_the_mean_as_often_as_it_promises():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(150):
        low, high = interval(rng.binomial(4, 0.4, 60) / 4)
        inside += low <= 0.4 <= high
    assert 0.88 <= inside / 150 <= 0.99


def test_the_interval_narrows_with_the_questions_and_repeats():
    values = np.tile([0.0, 1.0], 50)
    few, many = interval(values), interval(np.tile(values, 25))
    assert few == interval(values)
    assert few[1] - few[0] == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, rel=0.08), "95%, of a normal mean"
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(5, rel=0.2)
    assert interval(np.array([0.25])) == (0.25, 0.25)
    assert interval(np.ones(9)) == (1.0, 1.0)
