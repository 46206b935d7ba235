"""Circles and garbage are found; prose, lists and short answers are not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.observe.garbled import REPEATED, UNREADABLE, answer_metrics, repeated, unreadable
from tests.support.episodes import plain_rollout


class Characters:
    """A tokenizer whose ids are characters."""

    @staticmethod
    def batch_decode(rows):
        return ["".join(map(chr, row)) for row in rows]


def answer(text, **changes):
    return plain_rollout([ord(c) for c in text], np.zeros(len(text)), **changes)


def test_an_answer_in_circles_is_told_from_one_that_is_not():
    draw = np.random.default_rng(0)
    assert repeated(draw.integers(0, 50_000, 500)) == 0
    assert repeated(np.tile(draw.integers(0, 50_000, 20), 25)) > 0.9
    assert repeated(np.tile([3], 100)) > 0.9
    half = np.concatenate([draw.integers(0, 50_000, 300), np.tile([3, 4], 50)])
    assert 0.2 < repeated(half) < REPEATED
    assert repeated(np.tile([3], 63)) == 0


@pytest.mark.parametrize(("text", "broken"), [("Zażółć gęślą jaźń, 日本語\n\t🙂", 0), ("a\ufffdb\x00", 0.5), ("", 0)])
def test_what_nobody_can_read_is_counted_by_character(text, broken):
    assert unreadable(text) == pytest.approx(broken)
    assert UNREADABLE < 0.5


def test_shares_are_of_the_answers_of_a_step():
    answers = [answer("abc" * 40), answer("\ufffd\ufffdab"), answer("fine"), answer("4")]
    assert answer_metrics(answers, Characters()) == {
        "response/repeating_fraction": 0.25,
        "response/garbage_fraction": 0.25,
    }


def test_what_the_policy_read_is_not_its_own():
    text = "ab" * 50 + "4"
    own = np.arange(len(text)) >= 100
    read = answer(text, trained=own, weight_versions=np.where(own, 0, -1).astype(np.int32))
    assert answer_metrics([read], Characters())["response/repeating_fraction"] == 0
    assert answer_metrics([], Characters()) == {"response/repeating_fraction": 0, "response/garbage_fraction": 0}
