"""Histograms of log-ratios are drawn where their log-ratios are."""

import numpy as np
import pytest

from pipeline.observe.report.ratio_figures import Ratio, draw_ratio_by_step, draw_ratio_of_steps, ratio_of
from pipeline.observe.step_record import BIN_EDGES, histogram

CENTRE = len(BIN_EDGES) // 2


def record(values, bounds=(None, None), level="token"):
    made = histogram([np.array(values)], [np.zeros(len(values))], level) | {"bounds": list(bounds)}
    return {"ratios": {"current/proximal": made}}


def test_shares_add_up_and_a_ratio_of_one_has_not_moved():
    ratio = ratio_of(record([0.0, 0.1]), "current/proximal")
    assert ratio.share.sum() == 1
    assert ratio.moved
    assert not ratio_of(record([0.0, 0.0]), "current/proximal").moved


def test_a_record_without_this_histogram_or_with_other_bins_has_none():
    assert ratio_of({}, "current/proximal") is None
    assert ratio_of(record([]), "current/proximal") is None
    assert ratio_of({"ratios": {"current/proximal": {"counts": [1, 2]}}}, "current/proximal") is None


@pytest.mark.parametrize("bound", [-0.02, 0.03, 1.2e-4])
def test_a_bound_lies_in_the_bin_that_counts_it(bound):
    ratio = ratio_of(record([0.0, bound], (bound, None)), "current/proximal")
    counted = int(np.flatnonzero(ratio.share)[np.flatnonzero(ratio.share) != CENTRE][0]) - CENTRE
    (line,) = draw_ratio_of_steps({1: ratio}).layout.shapes
    assert round(line.x0) == counted
    figure, _ = draw_ratio_by_step({1: ratio})
    words = figure.data[0].y[round(figure.layout.shapes[0].y0)]
    low, high = map(float, words.split(" to "))  # to two digits
    assert low - 0.05 * abs(low) <= bound <= high + 0.05 * abs(high)


def test_the_first_step_the_middle_and_the_last_are_drawn_over_each_other():
    ratios = {step: ratio_of(record([0.0, 0.1 * step]), "current/proximal") for step in (2, 3, 5, 9)}
    assert [trace.name for trace in draw_ratio_of_steps(ratios).data] == ["step 2", "step 5", "step 9"]
    figure, _ = draw_ratio_by_step(ratios)
    assert list(figure.data[0].x) == [2, 3, 5, 9]
    assert np.nansum(10.0 ** np.array(figure.data[0].z), axis=0) == pytest.approx(np.ones(4))


def test_bins_that_count_nothing_are_left_out_but_for_a_margin():
    share = np.zeros(len(BIN_EDGES) + 1)
    share[CENTRE] = 1.0
    (trace,) = draw_ratio_of_steps({1: Ratio("token", share, 0, (None, None))}).data
    assert list(trace.x) == [-2, -1, 0, 1, 2]
