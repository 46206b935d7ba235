"""A run whose answers come through sampler processes, and are graded beside them, is the run whose answers come through
the controller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.dumps.dump import dump_path, read_dump
from tests.support.command import SMALL

RUN = [*SMALL, "rewards=tests.support.verifiers:length", "debug.dump_rollouts=true", "checks.first_rollouts=0",
       "server.deterministic=true", "train.steps=2"]  # fmt: skip
ARRAYS = ("prompt_ids", "response_ids", "rollout_logprobs", "routes", "weight_versions", "trained")


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def episodes(run) -> list:
    batches = [read_dump(dump_path(run.run / "dumps", step)).batch for step in (1, 2)]
    return [episode for batch in batches for group in batch.groups for episode in group.episodes]


def table(run) -> list[dict]:
    """Rows of the episodes, without what the clock decides."""
    return [
        {name: value for name, value in row.items() if name not in ("sample_s", "grade_s")}
        for part in sorted((run.run / "episodes").glob("part_*.parquet"))
        for row in pyarrow.parquet.read_table(part).to_pylist()
    ]


@pytest.mark.proof
def test_deterministic_episodes_in_turn_with_training_are_the_same_bit_for_bit(command, tmp_path):
    runs, tables = [], []
    for samplers in (0, 1):
        run = command(*RUN, f"rollout.samplers={samplers}", folder=made(tmp_path / str(samplers)))
        assert run.end(200) == 0, run.text()
        assert run.orphans() == []
        runs.append(episodes(run))
        tables.append(table(run))
    here, there = runs
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        assert one.reward is not None
        assert (one.reward, one.last.finish_reason) == (other.reward, other.last.finish_reason)
        assert all(np.array_equal(getattr(one.last, name), getattr(other.last, name)) for name in ARRAYS)
    assert tables[0] == tables[1]
    assert {row["reward"] for row in tables[0]} == {np.float32(episode.reward) for episode in here}
    assert any(row["answer"] for row in tables[0])
