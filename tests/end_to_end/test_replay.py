"""What replay is for: both engines in bfloat16, and the trainer's mismatch with and without the server's routes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config import load_config
from pipeline.loop.compare import replay_probe
from pipeline.loop.open_loop import open_loop
from pipeline.rollout.sampler import sample_groups_sync

SETTINGS = ["supervised.steps=0", "precision.weights=bfloat16", "model.tiny.experts=16", "model.tiny.init_std=0.15",
            "rollout.max_new_tokens=48", "server.context_length=66", "checks.probe_rollouts=128",
            "run.seed=0"]  # fmt: skip


@pytest.mark.slow
def test_replayed_routes_reduce_the_mismatch_twofold_and_large_ratios_tenfold(tmp_path):
    (tmp_path / "logs").mkdir()
    config = load_config("configs/quickstart.yaml", SETTINGS)
    with open_loop(config, tmp_path, tmp_path / "logs") as (loop, _):
        sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
        groups = sample_groups_sync(loop.fleet, loop.source.take(32), 4, sampling)
        rollouts = [r for g in groups for r in g.rollouts]
        loop.load(rollouts)
        found = replay_probe(loop.trainers, rollouts)
    assert sum(len(r) for r in rollouts) == 128 * 48
    assert found["probe/k3_native"] > 2 * found["probe/k3_replay"]
    assert found["probe/f2_native"] > 1e-3
    assert found["probe/f2_native"] >= 10 * found["probe/f2_replay"]
