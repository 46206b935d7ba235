"""Device-hours, what of them is idle, and what they cost."""

from __future__ import annotations

import pytest

from pipeline.observe.device_hours import DeviceHours

STEP = {"time/step_s": 36.0, "time/rollout_s": 18.0, "time/train_s": 9.0, "time/sync_s": 9.0}


def test_in_turn_the_trainer_is_idle_while_servers_sample_and_they_while_it_trains():
    found = DeviceHours(ranks=2, servers=6).step(STEP, sampled=8000)
    assert found["devices/hours"] == pytest.approx(0.08)
    assert (found["devices/trainer_idle"], found["devices/servers_idle"]) == (0.5, 0.25)
    assert found["devices/idle_hours"] == pytest.approx(0.01 + 0.015)
    assert found["devices/tokens_per_hour"] == pytest.approx(8000 / 0.08)
    assert found["devices/tokens_per_trainer_hour"] == pytest.approx(8000 / 0.02)
    assert found["devices/tokens_per_server_hour"] == pytest.approx(8000 / 0.06)
    assert "devices/cost" not in found


def test_beside_each_other_both_tell_themselves_and_sums_go_on():
    hours = DeviceHours(ranks=1, servers=1, price=2.0)
    hours.step(STEP, 100)
    found = hours.step(STEP | {"idle/trainer": 0.1, "idle/servers": 0.0}, 1000)
    assert found["devices/trainer_idle"] == 0.1
    assert found["devices/hours"] == pytest.approx(0.04)
    assert found["devices/cost"] == pytest.approx(0.08)
    assert found["devices/cost_per_million_tokens"] == pytest.approx(2.0 * 0.02 * 1e3)


def test_a_replay_has_no_servers_and_a_step_without_seconds_counts_nothing():
    assert DeviceHours(1, 0).step({}, 5) == {}
    assert "devices/servers_idle" not in DeviceHours(1, 0).step(STEP, 5)


def test_devices_that_trainer_and_servers_share_by_turns_count_once():
    found = DeviceHours(ranks=2, servers=2, shared=True).step(STEP | {"time/step_s": 40.0}, sampled=8000)
    assert found["devices/hours"] == pytest.approx(2 * 40 / 3600)
    assert found["devices/idle_hours"] == pytest.approx(2 * 4 / 3600)
