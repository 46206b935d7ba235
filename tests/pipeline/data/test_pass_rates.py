import json

import numpy as np
import pytest

from pipeline.config.sources import CurriculumConfig
from pipeline.data.pass_rates import PassRates, pass_rate


def make(rows=10, seed=0, **fields):
    return PassRates(CurriculumConfig(**fields), rows, seed)


def test_a_pass_rate_is_the_share_of_rewards_that_reach_the_bound():
    assert pass_rate([1.0, 0.0, 0.3 + 0.6 + 0.1, 0.99], CurriculumConfig()) == 0.5
    assert pass_rate([1.0, 0.0, 0.6, 0.5], CurriculumConfig(passing_reward=0.5)) == 0.75


def test_a_newer_visit_counts_as_much_as_all_before_it():
    rates = make()
    for rewards in ([1.0, 1.0], [0.0, 0.0], [1.0, 0.0]):
        rates.learn(3, rewards)
    assert rates.rate[3] == pytest.approx(((1 + 0) / 2 + 0.5) / 2)
    assert rates.visits.tolist() == [0, 0, 0, 3, 0, 0, 0, 0, 0, 0]


def test_a_visit_without_rewards_is_none():
    rates = make()
    rates.learn(3, np.zeros(0))
    assert not rates.visits.any()


def test_what_is_always_solved_is_dropped_only_after_so_many_visits_in_a_row():
    rates = make(drop_solved_after=2)
    for rewards, asked in (([1, 1], True), ([1, 0], True), ([1, 1], True), ([1, 1], False)):
        rates.learn(0, rewards)
        assert rates.asks(0, epoch=1) is asked


def test_outside_the_band_a_share_is_asked_all_the_same():
    rates = make(4000, band=(0.2, 0.8), outside=0.25)
    for row in range(4000):
        rates.learn(row, [0.0, 0.0] if row % 2 else [1.0, 0.0])
    asked = [[rates.asks(row, epoch) for row in range(4000)] for epoch in (1, 2)]
    assert all(all(epoch[::2]) for epoch in asked)
    assert np.mean(asked[0][1::2]) == pytest.approx(0.25, abs=0.03)
    assert asked[0] != asked[1]
    assert asked[0] == [rates.asks(row, 1) for row in range(4000)]
    other = make(4000, seed=1, band=(0.2, 0.8), outside=0.25)
    other.restore(rates.state())
    assert asked[0] != [other.asks(row, 1) for row in range(4000)]


@pytest.mark.parametrize("band", [(0.5, 0.8), (0.2, 0.5)])
def test_the_ends_of_the_band_are_in_it(band):
    rates = make(band=band, outside=0.0)
    rates.learn(0, [1.0, 0.0])
    rates.learn(1, [1.0, 1.0])
    assert (rates.asks(0, 1), rates.asks(1, 1)) == (True, False)


def test_what_was_learned_comes_back_from_json_and_rows_that_are_gone_are_left_out():
    rates = make(band=(0.2, 0.8))
    rates.learn(1, [1.0, 0.0, 0.0])
    rates.learn(9, [1.0])
    again, shorter = make(), make(rows=5)
    again.learn(2, [1.0])
    for other in (again, shorter):
        other.restore(json.loads(json.dumps(rates.state())))
    for name in ("rate", "visits", "solved"):
        assert np.array_equal(getattr(again, name), getattr(rates, name))
    assert shorter.visits.tolist() == [0, 1, 0, 0, 0]


def test_the_state_of_many_prompts_is_small():
    rates = make(100_000)
    for row in range(100_000):
        rates.learn(row, [1.0] * (row % 5) + [0.0] * (4 - row % 5))
    assert len(rates.state()) < 1_000_000


@pytest.mark.parametrize("state", ["", "x", "AAAA"])
def test_another_text_is_no_state(state):
    with pytest.raises(ValueError, match="pass rates of prompts cannot be read"):
        make().restore(state)


def test_prompts_are_counted_by_how_often_they_are_solved():
    rates = make()
    for row, rewards in enumerate(([0, 0], [1, 0], [1, 1], [1, 1])):
        rates.learn(row, rewards)
    assert rates.metrics() == {"seen": 4, "always_solved": 0.5, "never_solved": 0.25, "sometimes_solved": 0.25}
    assert rates.histogram(4) == [1, 0, 1, 2]
    assert make().metrics() == {"seen": 0}
