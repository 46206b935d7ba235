from __future__ import annotations

import numpy as np

from pipeline.arrays import padded


def test_rows_are_padded_behind():
    assert padded([np.array([1, 2]), np.array([3])]).tolist() == [[1, 2], [3, 0]]
    assert padded([np.array([True]), np.array([True, True])]).tolist() == [[True, False], [True, True]]
