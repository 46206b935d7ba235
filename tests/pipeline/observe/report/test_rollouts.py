"""Tokens get the colour of their decade."""

import pytest

from pipeline.observe.report.rollouts import card, signed_level, surprise_level

ROLLOUT = {
    "prompt": "p", "index": 3, "sample": 0, "samples": 2, "metadata": {"answer": "7"}, "reward": 1.0, "advantage": None,
    "finish_reason": "length", "versions": [4, 5], "length": 9, "text": ["a\n", "b"], "rollout": [-0.5, None],
    "proximal": [-0.25, -1.0], "current": [-0.25, -1.0], "entropy": [0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("log_ratio", "level"),
    [(0.0, 0), (9e-8, 0), (1.1e-7, 1), (-5e-7, -1), (2e-2, 6), (-2e-2, -6), (0.2, 7), (-30.0, -7), (None, 7)],
)
def test_a_log_ratio_has_the_level_of_its_decade(log_ratio, level):
    assert signed_level(log_ratio) == level


@pytest.mark.parametrize(("logprob", "level"), [(0.0, 0), (-0.05, 0), (-0.2, 1), (-1.0, 2), (-9.0, 6), (None, 6)])
def test_an_improbable_token_has_a_high_level(logprob, level):
    assert surprise_level(logprob) == level


def test_a_card_says_what_is_not_shown_and_what_is_no_number():
    made = card(ROLLOUT)
    assert made.hidden == 7
    assert dict(made.facts) == {
        "reward": "1", "advantage": "not finite", "ended by": "the limit", "tokens": "9", "sample": "1 of 2, prompt 3",
        "weights": "4, 5", "answer": "7",
    }  # fmt: skip
    first, second = made.tokens
    assert first.text == "a\u23ce\n"
    assert first.classes == "m7 u0 s1"
    assert "trainer - server +2.50e-01" in first.title
    assert "server not finite" in second.title
