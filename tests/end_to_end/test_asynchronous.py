"""Rollouts beside training, with real engines: one run a version behind; one four behind, stopped and resumed.

Of the first `make test` has the run of `test_evaluation.py`, of the second the producer on servers made up, with what
it saves and goes on from (`tests/pipeline/rollout/test_producer.py`), and a signal to a run (`test_resume.py`).
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.dumps.dump import dump_path, read_dump
from tests.support.command import SMALL

RUN = [*SMALL, "rewards=tests.support.verifiers:length", "debug.dump_rollouts=true", "run.overwrite=false",
       "checks.first_rollouts=0", "checks.scored_rollouts=3", "checkpoint.keep_last=9"]  # fmt: skip
GROUPS = 8


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path, steps: int) -> list[list[int]]:
    """Indices of the prompts of each step."""
    batches = [read_dump(dump_path(run / "dumps", step)).batch for step in range(1, steps + 1)]
    return [[group.prompt.index for group in batch.groups] for batch in batches]


def check_rows(rows: list[dict], staleness: int) -> None:
    """What every asynchronous step promises."""
    assert rows[0]["train/grad_norm"] > 0
    for row in rows:
        assert row["rollout/lag_max"] <= staleness
        assert row["staleness/scored_tokens"] > 0
        assert row["mismatch/abs_logprob"] < 1e-5, "the servers hold the trainer's weights"
        assert row["routing/replayed_fraction"] == 1
        assert row["train/grad_norm"] > 0 or row["reward/uninformative_groups"] == 1, "answers may all get full length"
        assert 0 <= row["idle/servers"] <= 1
        assert 0 <= row["idle/trainer"] <= 1
        shares = [value for key, value in row.items() if re.fullmatch(r"rollout/lag_\d+", key)]
        assert sum(shares) == pytest.approx(1)


@pytest.mark.proof
def test_one_version_behind_every_step_after_the_first_trains_on_what_the_last_weights_sampled(command):
    run = command(*RUN, "rollout.max_staleness=1", "train.steps=3", "server.replicas=2")
    assert run.end(200) == 0, run.text()
    rows = rows_of(run.run)
    check_rows(rows, 1)
    assert [row["rollout/lag_max"] for row in rows] == [0, 1, 1]
    # an answer that an update interrupts goes on under the newer weights; where there was none, every token lags by 1
    interrupted = rows[-1]["servers/requests_interrupted"] > 0
    assert [row["rollout/lag_mean"] for row in rows] == [0, 1, 1] or interrupted
    assert all(row["rollout/lag_mean"] > 0 for row in rows[1:])
    assert rows[1]["staleness/abs_logprob"] > 100 * rows[1]["mismatch/abs_logprob"]
    assert rows[1]["staleness/scored_tokens"] >= 2 * 3
    first, second, third = trained(run.run, 3)
    assert sorted(first + second) == list(range(2 * GROUPS)), "both were admitted under the first weights"
    assert sorted(third) == list(range(2 * GROUPS, 3 * GROUPS))
    assert run.orphans() == []


@pytest.mark.proof
def test_stopped_and_resumed_four_versions_behind_each_prompt_is_trained_on_once(command, tmp_path):
    ahead = [*RUN, "rollout.max_staleness=4", "checkpoint.every_steps=100"]
    first = command(*ahead, "train.steps=99", "rollout.samplers=1", folder=tmp_path)  # whose open answers it saves
    first.wait_for("step  3/99")
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 75, first.text()
    done = int(re.search(r"ended by SIGTERM after step (\d+)", first.text())[1])
    saved = json.loads((first.run / f"checkpoints/step_{done}/rollouts/admission.json").read_text())
    assert len(saved["admission"]["open"]) == 4 * GROUPS
    assert first.orphans(60) == []

    last = done + 3
    second = command(*ahead, f"train.steps={last}", folder=tmp_path)
    assert second.end(200) == 0, second.text()
    rows = rows_of(second.run)
    check_rows(rows, 4)
    assert [row["weights/version"] for row in rows] == list(range(1, last + 1)), "none twice"
    assert rows[done]["rollout/lag_max"] > 0, "what was there before the stop is trained on"
    indices = np.concatenate(trained(second.run, last))
    assert sorted(indices.tolist()) == list(range(GROUPS * last))
    assert second.orphans() == []
