"""Which answers of majority@k are one and the same."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from pipeline.config.rewards import Rewards
from pipeline.rewards.given import given_by


def votes(rewards, *texts):
    given = given_by(TypeAdapter(Rewards).validate_python(rewards))
    assert given is not None
    return [given(text) for text in texts]


@pytest.mark.parametrize(
    ("rewards", "same", "other"),
    [
        ("exact_match", ["41", " 41\n"], ["14", "4 1"]),
        ("number", ["so 1,234.0", "$1234", "it is 1234."], ["1235", "-1234"]),
        ("number", ["3/4", "0.75", "6/8 of it"], ["4/3"]),
        ({"kind": "number", "after": "####"}, ["7 #### 12", "#### 12.0"], ["12 #### 7"]),
        ("multiple_choice", ["The answer is (C).", "\\boxed{C}"], ["The answer is (B)."]),
        ("math_verify", [r"\boxed{\frac{1}{2}}", r"$\boxed{ \dfrac{1}{2} }$"], [r"\boxed{\frac{1}{3}}"]),
        ("math_verify", [r"\boxed{1{,}000}", "about 1,000", r"\boxed{1000.}"], [r"\boxed{100}"]),
        ("reasoning_gym", ["hm <answer> 4 </answer>", "4"], ["<answer>5</answer>"]),
        (["length", "number"], ["4"], ["5"]),
    ],
)
def test_equal_answers_are_one_vote(rewards, same, other):
    if isinstance(rewards, list):
        rewards = [{"kind": "length", "free_tokens": 1, "full_tokens": 2}, "number"]
    found = votes(rewards, *same)
    assert len(set(found)) == 1
    assert found[0] is not None
    assert not set(votes(rewards, *other)) & set(found)


@pytest.mark.parametrize(
    ("rewards", "text"),
    [
        ("exact_match", "  "),
        ("number", "none"),
        ("number", "1/0"),
        ({"kind": "number", "after": "####"}, "12"),
        ("multiple_choice", "perhaps"),
        ({"kind": "math_verify", "boxed": True}, "12"),
        ("reasoning_gym", "<answer> </answer>"),
    ],
)
def test_an_answer_that_says_nothing_is_no_vote(rewards, text):
    assert votes(rewards, text) == [None]


@pytest.mark.parametrize("rewards", [{"kind": "regex", "pattern": "a"}, "code", "checks:mine"])
def test_verifiers_that_compare_no_answer_have_no_votes(rewards):
    assert given_by(TypeAdapter(Rewards).validate_python(rewards)) is None


def test_a_huge_exponent_is_no_work():
    assert votes("number", "1e999999", "1e999999") == ["1e999999/1"] * 2
