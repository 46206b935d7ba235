"""A disk that refuses: a sentence with path and space, and no torn row."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.disk.claim import claim
from pipeline.disk.disk_errors import DiskError, RunDirectoryError, of_the_disk
from pipeline.disk.rows import Rows
from pipeline.errors import FAILED, NOT_STARTED
from pipeline.observe.run_dir import RunDirectory
from tests.support.full_disk import MOUNTS, file_limit, fill, small_disk

LONG = {f"metric/{i}": i / 7 for i in range(900)}


def steps(file):
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_a_row_that_does_not_fit_whole_is_not_there(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append("x" * 99)
    with file_limit(250):
        rows.append("y" * 99)
        with pytest.raises(DiskError, match=r"rows\.jsonl was not written: File too large \(.* of .* are free there\)"):
            rows.append("z" * 99)
    assert (tmp_path / "rows.jsonl").read_text() == "x" * 99 + "\n" + "y" * 99 + "\n"
    rows.append("after")
    assert (tmp_path / "rows.jsonl").read_text().endswith("\nafter\n")


@pytest.mark.parametrize("change", [shutil.rmtree, lambda run: run.rename(run.with_name("moved"))])
def test_a_file_that_went_away_is_told(tmp_path, change):
    (tmp_path / "run").mkdir()
    rows = Rows(tmp_path / "run" / "rows.jsonl")
    rows.append("1")
    change(tmp_path / "run")
    with pytest.raises(DiskError, match=r"rows\.jsonl was removed or moved while the run wrote to it"):
        rows.append("2")


def test_a_file_that_was_replaced_is_told(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DiskError, match="removed or moved"):
        rows.append("2")


class Disk:
    """A place for a run, and how its disk begins to refuse."""

    def __init__(self, folder, kind, stack):
        self.kind, self.stack = kind, stack
        self.path = folder / "disk" / "run"
        if kind == "limit":
            self.path.parent.mkdir()
        else:
            stack.enter_context(small_disk(folder / "disk", "900k"))

    def refuse(self):
        if self.kind == "limit":
            self.stack.enter_context(file_limit((self.path / "metrics.jsonl").stat().st_size + 100))
        else:
            fill(self.path.parent)


def record_until_refused(disk: Disk) -> None:
    with RunDirectory(disk.path, {}) as run:
        for step in (1, 2):
            run.record({"step": step, **LONG})
        disk.refuse()
        for step in range(3, 99):
            run.record({"step": step, **LONG})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("limit", "File too large"),
        *([("full", "No space left on device")] if MOUNTS else []),
    ],
)
def test_a_run_keeps_its_last_whole_row(tmp_path, kind, words):
    with contextlib.ExitStack() as stack:
        disk = Disk(tmp_path, kind, stack)
        with pytest.raises(DiskError, match=rf"metrics\.jsonl was not written: {words} \(\d.* free there\)") as caught:
            record_until_refused(disk)
        assert caught.value.exit_code == FAILED
        done = steps(disk.path / "metrics.jsonl")
        assert done == list(range(1, len(done) + 1))
        assert len(done) >= 2


if MOUNTS:

    def test_events_on_a_full_disk_are_an_error_of_the_caller(tmp_path, capfd):
        from pipeline.observe.events import EventWriter

        with small_disk(tmp_path / "disk", "64k") as folder:
            events = EventWriter(folder)
            fill(folder)
            with pytest.raises(DiskError, match=r"events\.out.* was not written: No space left on device"):
                events.record(1, {str(number): 0.5 for number in range(999)})
            events.close()
        assert capfd.readouterr().err == ""

    def test_a_read_only_place_is_told_before_anything_starts(tmp_path):
        with small_disk(tmp_path / "disk", "64k", ",ro") as folder:
            said = rf"{folder / 'run'} cannot be written: Read-only file system \(.*\); set run\.directory to another"
            with pytest.raises(RunDirectoryError, match=said) as caught, claim(folder / "run"):
                pass
        assert caught.value.exit_code == NOT_STARTED

    def test_a_full_disk_at_the_start_leaves_the_earlier_run(tmp_path):
        with small_disk(tmp_path / "disk", "64k") as folder:
            with RunDirectory(folder / "run", {}) as run:
                run.record({"step": 1})
            fill(folder)
            with pytest.raises(RunDirectoryError, match="No space left on device"), claim(folder / "run"):
                RunDirectory(folder / "run", {"a": "b" * 9999}, overwrite=True)
            assert steps(folder / "run" / "metrics.jsonl") == [1]
            assert sorted(p.name for p in (folder / "run").iterdir() if p.name.startswith(".")) == []


@contextlib.contextmanager
def powerless():
    """As a user for whom permissions count."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("below", ["run", "deep/er/run"])
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_no_permission_is_told_before_anything_starts(tmp_path, below, mode):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own is closed to others
        os.chmod(place, 0o755)
        folder = Path(place) / "folder"
        folder.mkdir()
        folder.chmod(mode)
        said = rf"{folder / below} cannot be written: Permission denied \(.* are free there\); set run\.directory"
        with powerless(), pytest.raises(RunDirectoryError, match=said), claim(folder / below):
            pass
        folder.chmod(0o755)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_directory_under_a_file_is_told_before_anything_starts(tmp_path, below):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below / "run"
    with pytest.raises(RunDirectoryError, match=rf"{path} cannot be made: {tmp_path / 'file'} is a file"), claim(path):
        pass


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="run is a file; set"), claim(tmp_path / "run"):
        pass


@pytest.mark.parametrize("below", ["", "deep/run"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, below):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(RunDirectoryError, match=rf"run is a link to {tmp_path / 'gone'}, which is not there; set"),
        claim(tmp_path / "run" / below),
    ):
        pass


def test_a_link_to_a_directory_is_that_directory(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with claim(tmp_path / "run"), pytest.raises(RunDirectoryError, match="a run is going on"), claim(tmp_path / "disk"):
        pass
    assert list((tmp_path / "disk").iterdir()) == []


def test_errors_of_a_disk_in_a_run_become_a_sentence_and_others_stay(tmp_path):
    path = tmp_path / "run"
    with (
        pytest.raises(DiskError, match=r"facts\.json was not written: No such file or directory"),
        RunDirectory(path, {}),
    ):
        (path / "gone" / "facts.json").write_text("")
    with pytest.raises(ConnectionRefusedError), RunDirectory(path, {}):
        raise ConnectionRefusedError(111, "refused")
    assert of_the_disk(FileNotFoundError(2, "no such file", "/etc/nothing"), path) is None  # of another place


def test_a_full_disk_that_a_rank_tells_of_gets_the_space_once(tmp_path):
    from pipeline.trainer.waits import TrainerError

    told = of_the_disk(TrainerError("trainer rank 0 failed: OSError: [Errno 28] No space left on device"), tmp_path)
    assert told is not None
    assert str(told).startswith("trainer rank 0 failed: OSError: [Errno 28] No space left on device (")
    assert str(told).count("are free there") == 1
    assert of_the_disk(told, tmp_path) is None
    assert of_the_disk(TrainerError("trainer rank 0 died"), tmp_path) is None


def test_safetensors_tells_its_errors_otherwise(tmp_path):
    from safetensors.numpy import save_file

    with (
        pytest.raises(DiskError, match=r"run was not written: File too large \(.* free there\)"),
        RunDirectory(tmp_path / "run", {}),
        file_limit(1000),
    ):
        save_file({"a": np.zeros(4000)}, os.fspath(tmp_path / "run" / "a.safetensors"))
