"""The rule of asynchronous rollouts, situation by situation; whole schedules are beside it."""

import pytest

from pipeline.rollout.admission import Admission


def test_a_synchronous_run_admits_a_step_at_a_time():
    rule = Admission(2, 0, 0, version=1)
    rule.admit(0)
    rule.admit(1)
    assert rule.room == 0
    rule.finish(1)
    assert rule.ready() is None
    assert rule.waits_for() == [0]
    rule.finish(0)
    assert rule.take() == [0, 1]
    assert rule.room == 0, "admitted during the step, it would be a version behind"
    assert rule.transferred() == 2
    assert rule.room == 2


def test_one_ahead_samples_a_step_while_the_trainer_works_on_another():
    rule = Admission(2, 1, 1)
    for index in range(4):
        rule.admit(index)
    assert rule.room == 0
    for index in range(4):
        rule.finish(index)
    assert rule.take() == [0, 1]
    assert rule.room == 0
    rule.transferred()
    assert rule.room == 2
    assert [rule.due(index) for index in rule.waiting] == [1, 1]


def test_a_step_waits_for_older_groups_where_newer_ones_would_leave_too_many_due_at_once():
    """Four steps' groups of version 0 are due at step 4; three steps that take younger ones would leave 3 B of them."""
    rule = Admission(1, 4, 3)
    for index in range(4):
        rule.admit(index)
    taken = []
    for step in range(6):
        young = max(rule.waiting)
        if not rule.open[young].finished:
            rule.finish(young)
        while rule.ready() is None:
            waited = rule.waits_for()
            assert all(rule.due(index) == 4 for index in waited), (step, waited)
            rule.finish(waited[0])
        taken += rule.take()
        rule.transferred()
        rule.admit(4 + step)
    assert set(range(4)) <= set(taken)


def test_places_of_dropped_groups_are_filled_once_and_counted_in_a_row():
    rule = Admission(2, 1, 1)
    for index in range(4):
        rule.admit(index)
    rule.drop(0, "uninformative")
    rule.drop(2, "failed")
    assert (rule.room, rule.dropped_in_a_row) == (2, 2)
    rule.finish(1)
    assert rule.dropped_in_a_row == 0
    assert dict(rule.ended) == {"uninformative": 1, "failed": 1}


def test_the_last_step_leaves_nothing_open():
    rule = Admission(2, 2, 1, version=5, last=5)
    assert rule.room == 2
    rule.admit(0)
    rule.admit(1)
    rule.finish(0)
    rule.finish(1)
    rule.take()
    assert rule.room == 0
    rule.transferred()
    assert rule.over


def test_the_end_of_the_data_makes_a_last_smaller_step():
    rule = Admission(3, 1, 1)
    rule.admit(0)
    rule.admit(1)
    rule.exhaust()
    assert rule.room == 0
    rule.finish(1)
    assert rule.ready() is None
    rule.drop(0, "failed")
    assert rule.take() == [1]
    rule.transferred()
    assert rule.over


def test_what_is_open_in_a_checkpoint_is_refused_where_it_cannot_be_trained_in_time():
    rule = Admission(2, 3, 3)
    for index in range(8):
        rule.admit(index)
    smaller = Admission(2, 1, 1)
    with pytest.raises(ValueError, match="cannot be trained within 1"):
        smaller.restore(rule.state())


def test_more_ahead_than_stale_is_refused():
    with pytest.raises(ValueError, match="ahead"):
        Admission(2, 1, 2)


def test_what_is_due_first_goes_first_and_then_what_was_admitted_first():
    rule = Admission(1, 3, 3)
    for index in range(4):
        rule.admit(index)
    rule.finish(3)
    assert rule.take() == [3]
    rule.renew(0, rule.transferred())  # it had no token yet
    for index in (0, 2, 1):
        rule.finish(index)
    taken = []
    for _ in range(3):
        taken += rule.take()
        rule.transferred()
    assert taken == [1, 2, 0]


def test_a_step_waits_for_no_group_that_may_be_left():
    rule = Admission(2, 2, 2)
    for index in range(6):
        rule.admit(index)
    rule.finish(0)
    rule.finish(1)
    rule.take()
    rule.transferred()
    rule.admit(6)
    rule.admit(7)
    rule.finish(6)
    rule.finish(2)
    assert rule.ready() is None, "3, 4 and 5 would be due at step 2, which takes two"
    assert rule.waits_for() == [3, 4, 5], "and not 7, which is due at step 3"


def test_in_the_order_of_admission_a_group_stays_due_in_that_order():
    rule = Admission(1, 2, 1, order="admission")
    rule.admit(0)
    rule.admit(1)
    rule.finish(0)
    rule.take()
    rule.renew(1, rule.transferred())
    assert rule.due(1) == 2
