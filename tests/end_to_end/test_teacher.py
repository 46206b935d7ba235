"""A teacher through the whole pipeline: on a server, beside the policy, from a checkpoint, at a temperature,
asynchronously, stopped and resumed."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.dumps.dump import dump_path, read_dump
from scripts.compare_teacher import WAYS
from tests.end_to_end.test_asynchronous import check_rows, rows_of, trained
from tests.support.command import SMALL

RUN = [*SMALL, "rewards=tests.support.verifiers:length", "debug.dump_rollouts=true", "run.overwrite=false",
       "checks.first_rollouts=0", "parallel={}", "supervised.steps=20", "train.mini_batches=1"]  # fmt: skip
GRADED = ["objective.preset=gspo_token", "objective.correction={kind: geometric_tis, high: 2.0}"]


def distilled(folder: Path, engine: str = "server", **cells) -> list[str]:
    return [f"teacher={{path: {folder}, engine: {engine}}}", f"objective.distillation={json.dumps(cells)}"]


def scores(run: Path, step: int) -> np.ndarray:
    """Of the sampled tokens of a dumped step, log mu and log pi_T, [2, tokens]."""
    rollouts = read_dump(dump_path(run / "dumps", step)).batch.rollouts
    both = [(r.rollout_logprobs[r.trained], r.teacher.logprobs[r.trained]) for r in rollouts if r.teacher is not None]
    assert len(both) == len(rollouts)
    return np.concatenate(both, axis=1)


@pytest.mark.proof
def test_a_policy_that_is_its_own_teacher_has_no_kl_whatever_scores_it_and_at_its_temperature(command):
    """The checkpoint before the first step holds the policy that samples it, so pi is pi_T to rounding: the server's
    scores are those of the trainer's network."""
    base = command(*RUN, "train.steps=0")
    assert base.end(200) == 0, base.text()
    own = ["supervised.steps=0", f"model={{path: {base.run / 'hf'}}}", "train.steps=1", "precision.temperature=0.7"]
    on_server = command(*RUN, *own, *GRADED, *distilled(base.run, reward=0.0))
    assert on_server.end(200) == 0, on_server.text()
    mu, teacher = scores(on_server.run, 1)
    assert np.abs(mu - teacher).max() < 1e-4
    (row,) = rows_of(on_server.run)
    assert abs(row["teacher/kl"]) < 1e-5
    assert row["teacher/tokens"] == mu.size
    term = ["train.steps=1", *distilled(base.run / "hf", "trainer", place="loss", reward=0.0)]
    beside = command(*RUN, *own, *term)
    assert beside.end(200) == 0, beside.text()
    (row,) = rows_of(beside.run)
    assert abs(row["teacher/kl"]) < 1e-5
    assert row["train/grad_norm"] < 1e-3
    assert on_server.orphans() == beside.orphans() == []


@pytest.mark.slow
@pytest.mark.proof
def test_stopped_and_resumed_two_versions_behind_every_answer_has_its_scores(command, tmp_path):
    """The teacher is an older checkpoint of the policy, over its likeliest tokens."""
    earlier = command(*RUN, "train.steps=1", "checkpoint.every_steps=1")
    assert earlier.end(200) == 0, earlier.text()
    ahead = [*RUN, "rollout.max_staleness=2", "checkpoint.every_steps=100", "checkpoint.keep_last=9"]
    ahead += ["objective.correction={kind: geometric_tis, high: 2.0}"]
    ahead += distilled(earlier.run / "checkpoints" / "step_1", place="loss", top_k=4)
    first = command(*ahead, "train.steps=99", folder=tmp_path)
    first.wait_for("step  2/99")
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 75, first.text()
    done = int(re.search(r"ended by SIGTERM after step (\d+)", first.text())[1])
    last = done + 2
    second = command(*ahead, f"train.steps={last}", folder=tmp_path)
    assert second.end(200) == 0, second.text()
    rows = rows_of(second.run)
    check_rows(rows, 2)
    indices = np.concatenate(trained(second.run, last))
    assert sorted(indices.tolist()) == list(range(8 * last))
    for step in range(1, last + 1):
        batch = read_dump(dump_path(second.run / "dumps", step)).batch
        assert {r.teacher.top_k for r in batch.rollouts} == {4}
    assert all(row["teacher/kl_top"] >= -1e-6 for row in rows)
    assert second.orphans() == []


@pytest.mark.proof
def test_where_hardly_an_answer_is_right_a_teacher_is_learned_from_faster_than_rewards(command):
    """As configs/distillation/student.yaml has it, with a smaller teacher that only has had supervised steps."""
    teacher = command("train.steps=0", "supervised.steps=150", "supervised.decay_steps=150",
                      "data.task.supervised_error_rate=0.05")  # fmt: skip
    assert teacher.end(200) == 0, teacher.text()
    short = ["train.steps=8", "train.decay_steps=null", "evaluate=[]", "checks.first_rollouts=0"]
    student = "configs/distillation/student.yaml"
    rewards = command(*short, *WAYS["rewards"], "train.decay_steps=null", config=student)
    assert rewards.end(200) == 0, rewards.text()
    taught = command(*short, f"teacher.path={teacher.run}", config=student)
    assert taught.end(200) == 0, taught.text()
    one, other = ([row["reward/mean"] for row in rows_of(run.run)] for run in (taught, rewards))
    assert max(one[0], other[0]) < 0.05
    assert np.mean(one[-3:]) > np.mean(other[-3:]) + 0.1, (one, other)
