"""An update whose gradient is far larger than the last ones' is not made, and the next are."""

from __future__ import annotations

import math

import pytest

from pipeline.config.run import TrainConfig
from pipeline.trainer.spikes import LEAST, GradientSpikes, SpikesError


def after(*norms, **rule):
    """Updates with these norms, each made or not by the limit that it met; what was said of each."""
    spikes, said = GradientSpikes(TrainConfig(**rule)), []
    for norm in norms:
        skipped = not math.isfinite(norm) or norm > spikes.limit
        spikes.took({"train/grad_norm": norm, "train/skipped_updates": float(skipped)})
        said.append(spikes.ended())
    return spikes, said


def test_without_a_rule_no_norm_is_too_large():
    spikes, said = after(1.0, 1e9)
    assert spikes.limit == math.inf
    assert said == ["", ""]


def test_a_norm_above_the_bound_is_skipped():
    spikes, said = after(1.0, 9.0, 2.0, skip_grad_norm_above=5)
    assert said == ["", "its gradient norm, 9, is above 5, the median of the last 1 is 1", ""]
    assert spikes.in_a_row == 0


def test_the_median_needs_some_updates_and_is_not_moved_by_what_was_skipped():
    norms = [1.0, 2.0, 1.0, 2.0, 1.0]
    assert len(norms) == LEAST
    spikes, said = after(*norms[:-1], 50.0, skip_grad_norm_times=10)
    assert not any(said)
    spikes, said = after(*norms, 50.0, 60.0, skip_grad_norm_times=10)
    assert spikes.limit == pytest.approx(10.0)
    assert [bool(words) for words in said[-2:]] == [True, True]
    assert spikes.in_a_row == 2


def test_updates_without_a_gradient_make_no_spike_of_those_that_have_one():
    """Of a task that is rarely solved most batches teach nothing."""
    spikes, said = after(*[0.0] * 20, 1.0, *[0.0] * 20, 2.0, 1.0, 0.0, 2.0, skip_grad_norm_times=10)
    assert spikes.limit == math.inf
    assert not any(said)
    spikes, said = after(*[1.0, 0.0, 0.0] * LEAST, 9.0, 11.0, skip_grad_norm_times=10)
    assert [bool(words) for words in said[-2:]] == [False, True]


def test_the_smaller_of_two_bounds_holds():
    assert after(*[1.0] * LEAST, skip_grad_norm_times=10, skip_grad_norm_above=3)[0].limit == 3
    assert after(*[1.0] * LEAST, skip_grad_norm_times=2, skip_grad_norm_above=3)[0].limit == 2


def test_steps_in_a_row_ask_for_a_rollback():
    spikes, _ = after(1.0, 9.0, 9.0, skip_grad_norm_above=5)
    spikes.check(3, None)
    spikes.check(3, 3)
    with pytest.raises(SpikesError, match=r"2 steps in a row, up to step 3, had a skipped update") as raised:
        spikes.check(3, 2)
    assert raised.value.step == 3


def test_a_gradient_that_is_not_finite_says_so():
    spikes = GradientSpikes(TrainConfig(skip_grad_norm_above=5))
    spikes.took({"train/grad_norm": 0.0, "train/skipped_updates": 1.0})
    assert spikes.ended() == "its gradient is not finite"
    assert spikes.in_a_row == 1
