"""Which source a prompt comes from: by weight, however small the weights are."""

from collections import Counter

import pytest

from pipeline.data.mixture import Cursor, Mixture


@pytest.mark.parametrize("unit", [1.0, 0.1, 1e-9, 1e12])
def test_shares_follow_the_weights_in_every_stretch_whatever_their_unit(unit):
    mixture = Mixture(["a", "b", "c"], [unit, 2 * unit, 5 * unit])
    cursor, drawn = mixture.start(), Counter()
    for count in range(1, 81):
        chosen, credit = mixture.next(cursor)
        cursor = Cursor(count, cursor.positions, credit)
        drawn[chosen] += 1
        assert all(abs(drawn[i] - count * share / 8) < 1 for i, share in enumerate((1, 2, 5)))
    assert drawn == {0: 10, 1: 20, 2: 50}
