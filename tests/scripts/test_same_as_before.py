"""Two runs are compared figure by figure, bit for bit, and nothing compared is no proof."""

from __future__ import annotations

import numpy as np

from scripts.same_as_before import compared, equal


def test_equal_is_bit_for_bit():
    assert equal(0.1, 0.1)
    assert equal(float("nan"), float("nan"))
    assert not equal(0.1, np.nextafter(0.1, 1))
    assert not equal(0.0, -0.0)
    assert not equal(np.zeros(2, np.int16), np.zeros(2, np.int32))


def test_what_differs_and_what_only_one_has_is_named(capsys):
    before, now = (
        {"step 1 loss": 0.5, "step 1 reward/mean": 1.0, "old": 1},
        {"step 1 loss": 0.5, "step 1 reward/mean": 2.0},
    )
    assert compared(before, now) == 1
    said = capsys.readouterr().out
    assert "2 figures compared, 1 differ: step 1 reward/mean" in said
    assert "in one of the two only: old" in said
    assert compared({"loss": 1.0}, {"loss": 1.0}) == 0
    assert compared({"a": 1}, {"b": 1}) == 1
