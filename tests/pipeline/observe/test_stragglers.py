"""A slow rank or server is named; a noisy one is not."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.observe.stragglers import STEPS, WINDOW, Stragglers, rank_seconds, table_of
from pipeline.types import Prompt
from tests.support.episodes import graded_group, plain_rollout, step_result


def step(number, ranks=(), paces=(), between=(), sync=(), gather=()):
    """A step of 1 s. ranks: seconds of each in the update, and likewise of the other phases, None of one that has no
    part in it; paces: of each server, seconds a token."""
    rollouts = [
        plain_rollout(range(4), np.zeros(4), servers=(server,), seconds=4 * pace) for server, pace in enumerate(paces)
    ] or [plain_rollout(range(4), np.zeros(4))]
    group = graded_group(Prompt(np.zeros(1, np.int32), "", index=0), rollouts, [0.0] * len(rollouts))
    rows = [r.rollout_logprobs for r in rollouts]
    result = step_result(number, [group], rows, rows, rows, [0.0] * len(rows), np.zeros((0, 3)))
    result.metrics["time/step_s"] = 1.0
    seconds = [{"update": (own, 0.5 - own)} for own in ranks]
    for phase, of_each in {"between": between, "sync": sync, "gather": gather}.items():
        for rank, own in zip(seconds, of_each or [None] * len(seconds), strict=True):
            rank |= {} if own is None else {phase: (own, 0.0)}
    return replace(result, ranks=seconds)


def watch(steps):
    said, metrics = [], []
    stragglers = Stragglers(said.append)
    for number, one in enumerate(steps, start=1):
        metrics.append(stragglers.step(step(number, **one)))
    return said, metrics


def test_a_rank_whose_phase_is_twice_as_slow_is_named_once_and_in_each_later_step():
    said, metrics = watch([{"ranks": (0.2, 0.2, 0.4, 0.2)}] * 8)
    assert len(said) == 1
    assert said[0].startswith(f"step {STEPS}: trainer rank 2 is slow: update takes it 2.0 times as long as the others")
    assert metrics[STEPS - 2] == {}
    assert metrics[-1] == {"straggler/rank": 2.0, "straggler/rank_times": 2.0, "straggler/rank_lost_s": 0.2}


def test_a_server_that_sleeps_is_named():
    said, metrics = watch([{"paces": (0.01, 0.05)}] * WINDOW)
    assert "server 1 is slow: sampling takes it 5.0 times as long" in said[0]
    assert metrics[-1]["straggler/server"] == 1.0
    # a step's rollout, here the whole second, would have taken a fifth of it
    assert metrics[-1]["straggler/server_lost_s"] == pytest.approx(0.8)


def test_noisy_cores_name_nobody():
    draw = random.Random(0)
    noisy = [{"ranks": [0.2 * draw.choice((1, 1, 2.5)) for _ in range(2)]} for _ in range(12)]
    said, metrics = watch(noisy)
    assert said == []
    assert not any(metrics)


def test_what_is_small_beside_the_step_names_nobody():
    assert watch([{"ranks": (0.01, 0.04)}] * 8)[0] == []


def test_one_that_is_no_longer_slow_is_named_again_when_it_is():
    slow, fast = {"ranks": (0.2, 0.5)}, {"ranks": (0.2, 0.2)}
    assert len(watch([slow] * 5 + [fast] * 3 + [slow] * 5)[0]) == 2


def test_seconds_are_a_row_a_phase():
    found = rank_seconds([{"update": (1.0, 0.5)}, {"update": (2.0, 0.0), "sync": (0.25, 0.0)}])
    assert found == {
        "update": {"own": [1.0, 2.0], "waited": [0.5, 0.0]},
        "sync": {"own": [0.0, 0.25], "waited": [0.0, 0.0]},
    }


def test_a_rank_that_is_late_for_its_calls_is_named_and_what_all_wait_for_is_nobodys():
    alike = {"ranks": (0.2, 0.2, 0.2, 0.2), "between": (0.3, 0.3, 0.3, 0.3)}
    assert watch([alike] * 8)[0] == []
    said, metrics = watch([alike | {"between": (0.3, 0.3, 0.7, 0.3)}] * 8)
    words = "trainer rank 2 is slow: its own work with what it does between phases takes it 3.0 times as long"
    assert len(said) == 1
    assert said[0].startswith(f"step {STEPS}: {words} as the others, 0.4 s more")
    assert metrics[-1] == pytest.approx({"straggler/rank": 2, "straggler/rank_times": 3, "straggler/rank_lost_s": 0.4})


def test_a_rank_that_is_slow_in_a_phase_is_named_for_it_alone_and_nobody_for_waiting_behind_it():
    # in a phase without a collective the other rank is done early, and its next call comes when both are
    seconds = [{"load": (0.1, 0.0), "between": (0.9, 0.0)}, {"load": (0.7, 0.0), "between": (0.3, 0.0)}]
    assert rank_seconds(seconds)["between"]["own"] == [0.0, 0.0]
    waits = [{"update": (0.1, 0.6), "between": (0.3, 0.0)}, {"update": (0.7, 0.0), "between": (0.3, 0.0)}]
    assert rank_seconds(waits)["between"]["own"] == [0.0, 0.0]
    late = [{"load": (0.1, 0.0), "between": (0.9, 0.0)}, {"load": (0.1, 0.0), "between": (1.5, 0.0)}]
    assert rank_seconds(late)["between"]["own"] == [0.0, 0.6]


def test_those_that_send_weights_are_held_against_one_another_and_the_others_likewise():
    alike = {"ranks": (0.1, 0.1, 0.1, 0.1), "sync": (0.3, 0.3, None, None), "gather": (None, None, 0.1, 0.1)}
    assert watch([alike] * 8)[0] == []
    (slow,) = watch([alike | {"sync": (0.3, 0.6, None, None)}] * 8)[0]
    assert "trainer rank 1 is slow: sync takes it 2.0 times" in slow
    (slow,) = watch([alike | {"gather": (None, None, 0.3, 0.1)}] * 8)[0]
    assert "trainer rank 2 is slow: gather takes it 3.0 times" in slow


def test_one_that_sends_alone_is_slow_beside_nobody():
    assert watch([{"ranks": (0.1, 0.1), "sync": (0.5, None), "gather": (None, 0.1)}] * 8)[0] == []


def test_the_table_has_the_ranks_of_each_phase_with_what_they_lost_between_beside_the_usual_work():
    seconds = [{"update": (1.0, 0.5), "between": (2.0, 0.0)}, {"update": (1.0, 0.0), "between": (2.5, 0.0)}]
    record = rank_seconds(seconds)
    assert record["between"] == {"own": [0.0, 0.5], "waited": [0.0, 0.0]}
    first, second = "trainer rank 0", "trainer rank 1"
    assert table_of(record, {}) == {"update": {first: 1.0, second: 1.0}, "between": {first: 1.0, second: 1.5}}
