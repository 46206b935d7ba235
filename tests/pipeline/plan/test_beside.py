"""Steps whose rollouts are made beside the training, followed under the rule of a run, against cases that are known."""

import numpy as np
import pytest

from pipeline.plan.beside import follow
from pipeline.plan.sampling import Server, sample
from pipeline.rollout.admission import Admission

GROUPS, SAMPLES = 8, 4


def server(places=1000, prefill=0.0):
    """A step takes 10 ms, whatever it holds."""
    return Server(1, 0, 0, 10**9, places, lambda batch, context: 0.01, lambda prompt: prefill)


def lengths(seed=0, tail=True):
    random = np.random.default_rng(seed)
    draw = random.pareto(1.5, (20 * GROUPS, SAMPLES)) * 50 + 50 if tail else np.full((20 * GROUPS, SAMPLES), 100.0)
    return np.round(np.minimum(draw, 2000))


def pace(staleness, ahead, *, train_s=1.0, sync_s=0.1, of=None, one=None, servers=2, **settings):
    rule = Admission(GROUPS, staleness, ahead, **settings)
    answers = lengths() if of is None else of
    return follow(answers, rule, servers, one or server(), 10, train_s=train_s, sync_s=sync_s, steps=12)


def test_without_staleness_a_step_is_one_phase_after_the_other():
    found = pace(0, 0, of=lengths(tail=False))
    assert found.seconds == pytest.approx(100 * 0.01 + 1.0 + 0.1)
    assert (found.trainer, found.lag) == (pytest.approx(1 / 2.1), 0)


def test_a_synchronous_step_of_a_formula_is_the_step_that_is_followed():
    one = server(places=6)
    answers = lengths()
    found = follow(answers[:GROUPS], Admission(GROUPS, 0, 0), 2, one, 10, train_s=1.0, sync_s=0.1, steps=2)
    # each server has every second group here, every second answer there
    expected = sample(answers[:GROUPS].ravel(), 2, one, 10).rollout + 1.1
    assert found.seconds == pytest.approx(expected, rel=0.25)


def test_one_step_ahead_hides_the_rollout_behind_a_longer_training():
    found = pace(1, 1, of=lengths(tail=False), train_s=3.0)
    assert found.seconds == pytest.approx(3.1)
    assert (found.trainer, found.lag) == (pytest.approx(3 / 3.1), 1)
    # two steps of groups in flight: two steps a rollout, in which one trains and two transfers hold all up
    assert pace(1, 1, of=lengths(tail=False), train_s=0.2).seconds == pytest.approx((1.0 + 0.2 + 2 * 0.1) / 2)


def test_a_longer_staleness_hides_more_of_the_tail_and_costs_lag():
    runs = [pace(s, a) for s, a in ((0, 0), (1, 1), (4, 3))]
    seconds = [run.seconds for run in runs]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[2] < 0.6 * seconds[0]
    assert runs[2].lag > runs[1].lag == 1
    assert all(run.lag <= 4 for run in runs)


def test_in_the_order_of_admission_a_step_waits_for_the_longest_in_front():
    assert pace(8, 2, order="admission").seconds > 1.2 * pace(8, 2).seconds


def test_a_prefill_holds_up_its_server():
    slow = pace(0, 0, of=lengths(tail=False), one=server(prefill=0.02))
    answers_a_server = GROUPS * SAMPLES / 2
    assert slow.seconds == pytest.approx(2.1 + answers_a_server * 0.02, rel=0.01)
