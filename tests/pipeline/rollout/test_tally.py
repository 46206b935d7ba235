"""What is counted between two steps, at moments that the test names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pipeline.rewards import Failures
from pipeline.rollout.tally import Tally
from pipeline.types import Episode
from tests.support.episodes import plain_rollout


def test_servers_idle_as_long_as_they_have_no_request_and_count_by_their_share():
    tally = Tally(10.0)
    tally.servers(4, 1, 10.0)
    tally.servers(4, 4, 12.0)
    assert tally.read(14.0)[0]["idle/servers"] == pytest.approx((2 * 1 / 4 + 2 * 1) / 4)
    assert tally.read(15.0)[0]["idle/servers"] == pytest.approx(1), "as they stood at the last look"
    tally.servers(0, 0, 15.0)
    assert tally.read(16.0)[0]["idle/servers"] == 0


def test_answers_and_groups_are_counted_since_the_last_reading():
    tally = Tally(0.0)
    whole = plain_rollout([1, 2, 3], -np.ones(3))
    for answer in (whole, None, replace(whole, finish_reason="time")):
        tally.answer(None if answer is None else Episode((answer,)))
    for end in ("finished", "uninformative", "failed"):
        tally.group(end, Failures(2, Counter(raised=1)))
    metrics, failures = tally.read(2.0)
    assert metrics["throughput/rollout_tokens_per_s"] == 3
    assert (metrics["rollout/answers"], metrics["rollout/answers_cut"]) == (3, 2)
    assert metrics["rollout/groups_replaced"] == 2
    assert (failures.answers, metrics["reward/failures_raised"]) == (6, 3)
    metrics, failures = tally.read(3.0)
    assert (metrics["rollout/answers"], metrics["rollout/groups_replaced"], failures.answers) == (0, 0, 0)
