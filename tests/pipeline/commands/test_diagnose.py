"""The short form before a run's first step, on engines whose configurations really differ."""

from __future__ import annotations

import json

import pytest

from pipeline.commands.main import main

SMALL = [
    "supervised.steps=5", "supervised.decay_steps=null", "supervised.warmup_steps=0", "train.decay_steps=null",
    "train.steps=1", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4",
]  # fmt: skip
ROPE = json.dumps({"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}})
SERVER_ROTATES_OTHERWISE = f"server.extra_args={json.dumps(['--json-model-override-args', ROPE])}"


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_a_run_whose_engines_disagree_stops_before_its_first_step_with_the_part_that_differs(tmp_path, capsys):
    overrides = [*SMALL, f"run.directory={tmp_path / 'run'}", SERVER_ROTATES_OTHERWISE]
    assert main(["train", "configs/quickstart.yaml", *overrides]) == 1
    message = capsys.readouterr().err
    assert "The largest part is rotary embedding" in message
    assert "the trainer's rope_theta is 1000 " in message
    assert str(tmp_path / "run" / "diagnose.html") in message
    assert (tmp_path / "run" / "diagnose.html").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_dump_that_is_not_there_is_named_before_anything_starts(tmp_path, capsys):
    overrides = [f"run.directory={tmp_path / 'run'}", "--rollouts", str(tmp_path / "absent")]
    assert main(["diagnose", "configs/quickstart.yaml", *overrides]) == 2
    assert "there is no dump" in capsys.readouterr().err
