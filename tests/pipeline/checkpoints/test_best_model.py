"""The best model arrives whole, in a directory or at a hub, or the run says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.checkpoints.best_model import ExportError, check_export, export_best
from pipeline.checkpoints.store import CheckpointError


def write(text):
    return lambda folder: (folder / "model.safetensors").write_text(text)


def companions(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_a_better_model_replaces_the_last_one_once_it_is_whole(tmp_path):
    target = tmp_path / "out" / "best"
    assert export_best(str(target), tmp_path, write("one"), companions) == f"best model: {target}"
    export_best(str(target), tmp_path, write("two"), companions)
    assert (target / "model.safetensors").read_text() == "two"

    def fails(folder):
        (folder / "model.safetensors").write_text("th")
        raise OSError("no space left on device")

    with pytest.raises(CheckpointError, match=r"best.*no space left"):
        export_best(str(target), tmp_path, fails, companions)
    assert (target / "model.safetensors").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["best"]


@pytest.mark.parametrize(
    ("where", "words"),
    [("hub:name", "write hub:OWNER/NAME"), ("hub:a/b", "set HF_TOKEN"), ("{}/file", "holds no model"),
     ("{}/folder", "holds no model"), ("/proc/best", "cannot be written")],
)  # fmt: skip
def test_what_cannot_be_exported_to_is_refused_at_the_start(where, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match=words):
        check_export(where.format(tmp_path), None, tmp_path / "run")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["model", "."])
def test_the_model_that_the_run_begins_with_is_not_replaced(where, tmp_path):
    companions(tmp_path / "model")
    with pytest.raises(ExportError, match=r"would replace model\.path"):
        check_export(str(tmp_path / where), tmp_path / "model", tmp_path.parent / "run")
    check_export(str(tmp_path / "best"), tmp_path / "model", tmp_path / "run")


@pytest.mark.parametrize("where", ["runs/run", "runs", "link", "runs/run/../run"])
def test_the_runs_own_directory_is_not_replaced_also_before_it_is_there(where, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with pytest.raises(ExportError, match=r"would replace run\.directory"):
        check_export(str(tmp_path / where), None, tmp_path / "runs" / "run")


def test_a_hub_that_cannot_be_reached_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = export_best("hub:me/best", tmp_path, write("weights"), companions)
    assert "was not pushed to me/best" in said


def test_an_export_that_fails_at_its_last_act_leaves_the_earlier_one(tmp_path, monkeypatch):
    def fails(path, target):
        if path.name == ".best.partial":
            raise OSError("the disk is gone")
        os.rename(path, target)

    export_best(str(tmp_path / "best"), tmp_path, write("old"), companions)
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "left").write_text("by a run that was killed in between")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            export_best(str(tmp_path / "best"), tmp_path, write("new"), companions)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "model.safetensors").read_text() == "old"
    export_best(str(tmp_path / "best"), tmp_path, write("new"), companions)
    assert (tmp_path / "best" / "model.safetensors").read_text() == "new"


def test_an_earlier_export_may_be_replaced(tmp_path):
    companions(tmp_path / "best")
    check_export(str(tmp_path / "best"), None, tmp_path / "run")
    check_export(str(tmp_path / "new" / "best"), None, tmp_path / "run")
