"""A run whose answers come through sampler processes is the run whose answers come through the controller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.dumps.dump import dump_path, read_dump
from tests.support.command import SMALL

RUN = [*SMALL, "rewards=tests.support.verifiers:length", "debug.dump_rollouts=true", "checks.first_rollouts=0",
       "server.deterministic=true", "train.steps=2"]  # fmt: skip
ARRAYS = ("prompt_ids", "response_ids", "rollout_logprobs", "routes", "weight_versions", "trained")


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def rollouts(run) -> list:
    batches = [read_dump(dump_path(run.run / "dumps", step)).batch for step in (1, 2)]
    return [rollout for batch in batches for group in batch.groups for rollout in group.rollouts]


@pytest.mark.proof
def test_deterministic_rollouts_in_turn_with_training_are_the_same_bit_for_bit(command, tmp_path):
    runs = []
    for samplers in (0, 1):
        run = command(*RUN, f"rollout.samplers={samplers}", folder=made(tmp_path / str(samplers)))
        assert run.end(200) == 0, run.text()
        assert run.orphans() == []
        runs.append(rollouts(run))
    here, there = runs
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        assert one.finish_reason == other.finish_reason
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
