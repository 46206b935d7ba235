"""What a later attempt of a job does, and what a signal that does not wait leaves."""

from __future__ import annotations

import json

import pytest

from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import load_config
from pipeline.loop.run import _ended_at_once, requeued_attempt
from pipeline.loop.stop import Stopped, StopRequest


@pytest.fixture
def config(tmp_path):
    return load_config("configs/quickstart.yaml", [f"run.directory={tmp_path}", "checkpoint.every_steps=5"])


def test_a_requeued_attempt_resumes_from_a_checkpoint(config, tmp_path):
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    assert requeued_attempt(config) == (config, True)


@pytest.mark.parametrize(("written_by", "overwrite"), [("7", True), ("8", False), (None, False)])
def test_without_one_it_begins_anew_over_what_its_own_job_left_only(
    config, tmp_path, monkeypatch, written_by, overwrite
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if written_by is not None:
        (tmp_path / "facts.json").write_text(json.dumps({"environment": {"SLURM_JOB_ID": written_by}}))
    config = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
    changed, resume = requeued_attempt(config)
    assert not resume
    assert changed.run.overwrite == overwrite


@pytest.mark.parametrize(
    ("every", "saved", "at_once", "ends_with"),
    [
        (5, True, True, Stopped),
        (5, True, False, KeyboardInterrupt),  # Ctrl-C
        (5, False, True, KeyboardInterrupt),  # nothing to go on from
        (None, True, True, KeyboardInterrupt),  # an older run's
    ],
)
def test_a_second_signal_is_to_be_resumed_where_there_is_a_checkpoint(
    config, tmp_path, every, saved, at_once, ends_with
):
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every_steps": every})})
    if saved:
        (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    store, stop = CheckpointStore(tmp_path / "checkpoints"), StopRequest(60)
    stop.at_once, stop.signal_name = at_once, "SIGTERM" if at_once else None
    with pytest.raises(ends_with) as ended, _ended_at_once(config, store, stop):
        raise KeyboardInterrupt
    if ends_with is Stopped:
        assert str(ended.value) == f"ended by SIGTERM; --resume goes on from {tmp_path / 'checkpoints' / 'step_5'}"
