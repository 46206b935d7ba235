"""A slow rank or server is named; a noisy one is not."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.observe.stragglers import STEPS, WINDOW, Stragglers, rank_seconds, table_of
from pipeline.types import Prompt
from tests.support.episodes import graded_group, plain_rollout, step_result


def step(number, ranks=(), paces=()):
    """A step of 1 s. ranks: seconds of each in the update; paces: of each server, seconds a token."""
    rollouts = [
        plain_rollout(range(4), np.zeros(4), servers=(server,), seconds=4 * pace) for server, pace in enumerate(paces)
    ] or [plain_rollout(range(4), np.zeros(4))]
    group = graded_group(Prompt(np.zeros(1, np.int32), "", index=0), rollouts, [0.0] * len(rollouts))
    rows = [r.rollout_logprobs for r in rollouts]
    result = step_result(number, [group], rows, rows, rows, [0.0] * len(rows), np.zeros((0, 3)))
    result.metrics["time/step_s"] = 1.0
    return replace(result, ranks=[{"update": (own, 0.5 - own)} for own in ranks])


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


def test_the_rank_that_sends_the_weights_is_not_slow_for_it():
    assert set(table_of({"sync": {"own": [0.9, 0.1]}, "update": {"own": [1.0, 1.0]}}, {})) == {"update"}
