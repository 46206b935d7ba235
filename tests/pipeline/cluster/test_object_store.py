"""Ray's object store holds the steps that are on their way."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from pipeline.cluster import object_store
from pipeline.config import load_config_and_model

PRESET = "configs/qwen3-30b-a3b/2-nodes.yaml"


def size(*overrides, free=1e13, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    return object_store.object_store_gb(*load_config_and_model(PRESET, list(overrides)))


def test_two_steps_of_the_longest_answers_fit_and_more_where_rollouts_run_ahead(monkeypatch):
    tokens = 64 * 16 * (1024 + 8192)
    assert size(monkeypatch=monkeypatch) == pytest.approx(2 * tokens * (48 * 8 + 32) / 1e9)
    ahead = size("rollout.max_staleness=2", "objective={preset: gspo, correction: none}", monkeypatch=monkeypatch)
    assert ahead == pytest.approx(4 * tokens * (48 * 8 + 32) / 1e9)
    assert size("replay=none", monkeypatch=monkeypatch) == pytest.approx(2 * tokens * 32 / 1e9)


def test_half_of_what_is_free_is_left_and_half_a_gigabyte_is_the_least(monkeypatch):
    assert size(free=6e9, monkeypatch=monkeypatch) == 3.0
    assert size(free=6e7, monkeypatch=monkeypatch) == 0.5
    assert size("cluster.object_store_gb=0.2", monkeypatch=monkeypatch) == 0.2
