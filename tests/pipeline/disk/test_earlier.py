"""Whatever happens while a new run starts over an earlier one, that one is there, whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from pipeline.disk import earlier
from pipeline.disk.claim import claim
from pipeline.observe.run_dir import RunDirectory, RunDirectoryError

METRICS = {"step": 1, "reward/mean": 0.5}


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture
def old(tmp_path):
    """A run with a step, a checkpoint and a model; its directory and its files."""
    with RunDirectory(tmp_path / "run", {"name": "old"}) as run:
        run.record(METRICS)
    for name in ("checkpoints/step_1/progress.json", "hf/model.safetensors", "logs/sglang.log"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(f"old {name}")
    return run.path, files(run.path)


def fail(path: Path, *, made: str) -> None:
    """A start that ends before its first step. made: a file that it writes."""
    with RunDirectory(path, {"name": "new"}, overwrite=True):
        (path / made).parent.mkdir(parents=True, exist_ok=True)
        (path / made).write_text("new")
        raise KeyboardInterrupt


def test_a_start_that_fails_leaves_the_earlier_run_to_the_byte(old, capsys):
    path, before = old
    with pytest.raises(KeyboardInterrupt):
        fail(path, made="model/model.safetensors")
    assert files(path) == before
    assert capsys.readouterr().err == f"sameroute: the earlier run in {path} is as it was\n"


def test_the_logs_of_a_start_that_fails_are_kept_apart_and_the_next_failure_replaces_them(old, capsys):
    path, before = old
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fail(path, made="logs/sglang.log")
        after = files(path)
        assert {name: data for name, data in after.items() if not name.startswith("failed/")} == before
        assert after["failed/logs/sglang.log"] == b"new"
        assert after["failed/config.yaml"] == b"name: new\n"
    assert f"the logs of this start are in {path / 'failed' / 'logs'}" in capsys.readouterr().err


def test_the_earlier_run_goes_with_the_first_step_and_not_before(old):
    path, before = old
    with RunDirectory(path, {"name": "new"}, overwrite=True) as run:
        assert files(path / ".before") == before
        run.record(METRICS)
        assert not (path / ".before").exists()
    assert "hf/model.safetensors" not in files(path)
    assert (path / "config.yaml").read_text() == "name: new\n"


def test_a_checkpoint_of_the_supervised_phase_counts_as_a_beginning(old):
    path, _ = old
    with pytest.raises(KeyboardInterrupt):
        fail(path, made="checkpoints/supervised_3/progress.json")
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["supervised_3"]
    assert not (path / ".before").exists()


def test_a_failed_start_does_not_refuse_the_corrected_command(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fail(path, made="logs/sglang.log")
    assert (path / "logs" / "sglang.log").is_file()  # where the message says
    with RunDirectory(path, {"name": "right"}) as run:
        assert (path / "failed" / "logs" / "sglang.log").is_file()
        run.record(METRICS)
    assert not (path / "failed").exists()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        RunDirectory(path, {"name": "another"})


def test_a_start_that_started_nothing_leaves_nothing(tmp_path):
    path = tmp_path / "some" / "where" / "run"
    with pytest.raises(KeyboardInterrupt), claim(path), RunDirectory(path, {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


class Crash(Exception):
    """kill -9 at this moment."""


def crash_after(renames: int, monkeypatch) -> None:
    """The process dies in its (renames + 1)-th rename. Afterwards renames work."""
    original, left = Path.rename, [renames]

    def rename(self, target):
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("renames", range(8))
def test_a_crash_between_any_two_renames_of_moving_aside_is_undone_by_the_next_start(old, monkeypatch, renames):
    path, before = old
    assert len(os.listdir(path)) == 8  # and one rename that says that all of them are aside
    crash_after(renames, monkeypatch)
    with pytest.raises(Crash):
        earlier.set_aside(path)
    monkeypatch.undo()
    with claim(path) as claimed:
        assert "a start was interrupted that had moved the earlier run aside" in claimed.notes[0]
        assert files(path).keys() - before.keys() == {".lock"}
        assert before.items() <= files(path).items()


@pytest.mark.parametrize("renames", range(13))
def test_a_crash_between_any_two_renames_of_putting_back_is_undone_too(old, monkeypatch, renames):
    path, before = old
    earlier.set_aside(path)
    (path / "logs").mkdir()
    for name in ("logs/sglang.log", "config.yaml", "facts.json"):
        (path / name).write_text("new")
    crash_after(renames, monkeypatch)
    with contextlib.suppress(Crash):  # the last of these come through
        earlier.put_back(path)
    monkeypatch.undo()
    earlier.put_back(path)
    after = files(path)
    assert {name: data for name, data in after.items() if not name.startswith("failed/")} == before
    assert not any((path / name).exists() for name in (".before", ".before.moving"))


def test_a_killed_start_is_said_and_an_interrupted_removal_is_finished(old):
    path, before = old
    run = RunDirectory(path, {"name": "new"}, overwrite=True)
    (run.logs / "sglang.log").write_text("new")
    run.close()  # and is never heard of again
    (path / ".removed").mkdir()
    with claim(path) as claimed:
        assert len(claimed.notes) == 2
        assert claimed.notes[0].startswith("removed the rest of an earlier run")
        assert claimed.notes[1].endswith(f"{path} is as before; what that start wrote is in {path / 'failed'}")
    assert {name: data for name, data in files(path).items() if not name.startswith("failed/")} == before


def test_a_refused_start_touches_nothing(old):
    path, before = old
    (path / "thesis.tex").write_text("years")
    with pytest.raises(RunDirectoryError, match=r"no run has written \(thesis\.tex\)"), claim(path):
        RunDirectory(path, {}, overwrite=True)
    assert files(path) == before | {"thesis.tex": b"years"}
