"""What the verifiers of plain text say: number, multiple choice, regex, length. Each is called as a worker calls it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.rewards import Component, Question
from pipeline.rewards.registry import load
from pipeline.types import Prompt

IDS = np.zeros(10, np.int32)


def verdict(settings, response, finish_reason="stop", trained_tokens=None, **metadata):
    asked = Question(Prompt(IDS, "a question", metadata, 0), response, IDS, finish_reason, trained_tokens)
    return load(Component("one", settings))(asked)


NUMBER = {"kind": "number"}


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("18", "so she has 18", 1),
        ("18", "18 eggs, then 17", 0),
        ("18", "no number", 0),
        ("1234", "1,234 dollars", 1),
        ("1,234.50", "$1234.5", 1),
        ("-3", "it is -3.", 1),
        ("-3", "it is \u22123", 1),
        ("3", "it is -3", 0),
        ("42", "So:\n- 42", 1),
        ("5", "10 - 5", 1),
        ("-5", "x = - 5", 1),
        ("-5", "$- 5$", 1),
        ("-5", "-$5", 1),
        ("0.75", "3/4", 1),
        ("3/4", "75/100", 1),
        ("3/4", "0.7500001", 0),
        ("1000", "1e3", 1),
        ("50", "50%", 1),
        ("5", "5km", 1),
        ("12", "on 3-12", 1),
        ("1" * 40, "1" * 39 + "2", 0),
        ("1" * 5000, "1" * 5000, 1),
        ("1", "1e999999", 0),
        ("1", "1/0", 0),
        ("2", "H2", 0),
        (7, "7", 1),
        ("10 + 8 = 18 #### 18", "18", 1),
    ],
)
def test_the_last_number_is_compared_by_its_value(answer, response, reward):
    assert verdict(NUMBER, response, answer=answer) == reward


def test_a_number_may_be_announced_and_may_be_near():
    after = NUMBER | {"after": "####"}
    assert verdict(after, "3 + 4 = 7\n#### 7\nor so, 8", answer="... #### 7") == 1
    assert verdict(after, "3 + 4 = 7", answer="#### 7") == 0
    near = NUMBER | {"tolerance": 0.01}
    assert [verdict(near, text, answer="3.14159") for text in ("3.14", "3.2", "22/7")] == [1, 0, 1]


def test_an_answer_that_was_cut_off_is_wrong_and_one_to_compare_with_that_is_none_is_named():
    assert verdict(NUMBER, "18", "length", answer="18") == 0
    with pytest.raises(ValueError, match="there is no number in the answer 'many'"):
        verdict(NUMBER, "18", answer="many")
    with pytest.raises(KeyError):
        verdict(NUMBER, "18")


CHOICE = {"kind": "multiple_choice"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is (C).", "C"),
        ("The answer is C", "C"),
        ("**Answer: B**", "B"),
        ("\\boxed{D}", "D"),
        ("\\boxed{\\text{(A)}}", "A"),
        ("A is wrong, B is wrong.\nD", "D"),
        ("(A) and (B) fail, so it is (C)", "C"),
        ("So I choose B", "B"),
        ("B", "B"),
        ("The answer is A. No, the answer is B.", "B"),
        ("It is E", None),
        ("A cat sat.", None),
        ("", None),
    ],
)
def test_the_letter_that_is_chosen_is_found(response, letter):
    assert [verdict(CHOICE, response, answer=one) for one in "ABCD"] == [float(letter == one) for one in "ABCD"]


def test_a_choice_may_be_given_by_its_place_and_must_be_one():
    assert verdict(CHOICE, "(B)", answer=1) == 1
    assert verdict(CHOICE | {"choices": "ABCDE"}, "(E)", answer="(e)") == 1
    assert verdict(CHOICE, "(B)", "length", answer="B") == 0
    with pytest.raises(ValueError, match="the answer 'E' is none of A, B, C, D, nor a place from 0"):
        verdict(CHOICE, "(B)", answer="E")


def test_a_pattern_is_a_format_or_an_answer_in_its_place():
    form = {"kind": "regex", "pattern": r"(?s)\A<think>.+</think>.+\Z"}
    assert [verdict(form, text) for text in ("<think>a\nb</think>c", "c")] == [1, 0]
    answer = {"kind": "regex", "pattern": r"ANSWER: (?P<answer>\w+)"}
    assert verdict(answer, "ANSWER: no ANSWER: yes", answer="yes") == 1
    assert verdict(answer, "ANSWER: yes ANSWER: no", answer="yes") == 0
    assert verdict(answer, "yes", answer="yes") == 0


def test_length_counts_the_tokens_that_the_policy_sampled():
    soft = {"kind": "length", "free_tokens": 4, "full_tokens": 8}
    assert [verdict(soft, "", trained_tokens=n) for n in (0, 4, 5, 8, 100)] == [0, 0, -0.25, -1, -1]
    assert verdict(soft, "") == -1  # all ten
