"""Adapters through the whole pipeline, with real engines: they learn beside the sampling, stop, and go on."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoints.resume import ResumeError
from tests.end_to_end.test_resume import rows_of, start_of
from tests.support.command import SMALL
from tests.support.convert_cli import convert

LORA = "lora={rank: 4, alpha: 8}"
RUN = [*SMALL, LORA, "rewards=tests.support.verifiers:length", "checkpoint.every_steps=2", "server.deterministic=true",
       "run.overwrite=false", "train.lr=3e-4", "checkpoint.keep_last=9", "parallel={ranks: 2, expert: 2}",
       "checks.first_rollouts=0", "weights.checksum_every=1"]  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ([LORA], ["lora={rank: 8, alpha: 8}"], "lora.rank is 4 in it, 8 in the configuration"),
        ([LORA], ["lora={rank: 4, alpha: 8, targets: [experts]}"], "lora.targets is all in it, "),
        ([LORA], [], "it holds adapters alone, and lora is left out"),
    ],
)
def test_other_adapters_are_refused(tmp_path, saved, now, message):
    with pytest.raises(ResumeError, match=message):
        start_of(tmp_path, saved, ["run.overwrite=false", *now])


@pytest.mark.proof
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(command, tmp_path):
    first = command(*RUN, "train.steps=9999", folder=tmp_path)
    first.wait_for("checkpoints/step_4")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    shutil.copytree(first.run, tmp_path / "straight")
    for step in first.run.glob("checkpoints/step_*"):
        if step.name != "step_2":
            shutil.rmtree(step)
    second = command(*RUN, "train.steps=4", folder=tmp_path)
    assert second.end(200) == 0, second.text()
    assert "resuming from" in second.text()

    rows, expected = rows_of(second.run / "metrics.jsonl"), rows_of(tmp_path / "straight" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows == expected[:4]
    assert all(row["train/grad_norm"] > 0 and row["mismatch/abs_logprob"] < 1e-5 for row in rows)
    assert all(row["routing/replayed_fraction"] == 1 for row in rows)
    again, straight = second.run / "checkpoints/step_4", tmp_path / "straight/checkpoints/step_4"
    sums = [json.loads((folder / "checksums.json").read_text()) for folder in (again, straight)]
    mine, theirs = ({n: s for n, s in of.items() if "distcp" in n} for of in sums)
    assert len(mine) == 2
    assert mine == theirs, "adapters, moments, generators"

    merged, peft = tmp_path / "merged", tmp_path / "peft"
    answers = convert(["to-hf", again, merged], ["to-peft", again, peft])
    assert [answer.code for answer in answers] == [0, 0], answers
    final, written = load_file(second.run / "hf/model.safetensors"), load_file(merged / "model.safetensors")
    base = load_file(second.run / "model/model.safetensors")
    assert final.keys() == written.keys() == base.keys()
    assert all(np.abs(final[name] - written[name]).max() <= 1e-6 for name in final)
    moved = {name for name in final if not np.array_equal(final[name], base[name])}
    projections = {name for name in final if name.endswith("_proj.weight")}
    assert moved <= projections
    assert len(moved) > 0.9 * len(projections), "an expert may have had no token"
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (peft, second.run / "peft"))
    assert all(np.array_equal(one[name], other[name]) for name in one | other)


@pytest.mark.proof
def test_adapters_learn_the_quickstarts_task_beside_the_sampling(command, tmp_path):
    base = command("train.steps=0", "supervised.steps=150", "supervised.decay_steps=150", folder=tmp_path / "base")
    assert base.end(200) == 0, base.text()
    run = command(
        f"model={{path: {base.run / 'hf'}}}", "supervised.steps=0", "lora={rank: 8, alpha: 16}", "train.lr=3e-3",
        "train.steps=25", "train.decay_steps=50", "rollout.prompts_per_step=16", "rollout.max_staleness=1",
        "weights.checksum_every=5", folder=tmp_path / "lora",
    )  # fmt: skip
    assert run.end(300) == 0, run.text()
    rows = rows_of(run.run / "metrics.jsonl")
    rewards = [row["reward/mean"] for row in rows]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2, rewards
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-5, "engines agree after every transfer"
    assert max(row["rollout/lag_max"] for row in rows) == 1
