"""One temporary folder a run, for its user alone, gone whatever way the run ends."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.disk.owner import Owner
from pipeline.disk.scratch import scratch_folder

HOLD = """
import sys, time
from pipeline.disk.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_is_made_in_the_temporary_folder_goes_with_it(monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    before = tempfile.gettempdir()
    with scratch_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert Path(tempfile.mkdtemp(prefix="torch-shm-dir-")).parent == folder
        child = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"], capture_output=True, text=True
        )
        assert Path(child.stdout.strip()).parent == folder
    assert not folder.exists()
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == (before, None)


def test_one_inside_another_is_the_same():
    with scratch_folder() as folder:
        with scratch_folder() as inner:
            assert inner == folder
        assert folder.is_dir()
    assert not folder.exists()


@pytest.fixture(params=[20, 60, 98, 200])
def long(request):
    """A temporary folder whose path has so many bytes."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as parent:
        folder = Path(parent) / ("x" * (request.param - len(parent) - 1))
        folder.mkdir()
        yield folder


def test_it_is_short_whatever_the_temporary_folder_is(long, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with scratch_folder() as folder:
        assert len(os.fsencode(folder)) <= 30
    assert os.environ["TMPDIR"] == str(long)


@pytest.fixture
def killed():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    yield process, folder
    process.kill()
    process.wait()


def test_the_folder_of_a_run_that_lives_stays_and_that_of_a_killed_one_goes_with_the_next_start(killed):
    process, folder = killed
    with scratch_folder():
        assert folder.is_dir()
    process.kill()
    process.wait()
    assert folder.is_dir()
    with scratch_folder():
        assert not folder.exists()


def test_what_cannot_be_seen_from_here_or_is_of_nobody_stays():
    with (
        tempfile.TemporaryDirectory(prefix="sameroute-") as far,
        tempfile.TemporaryDirectory(prefix="sameroute-") as no,
    ):
        owner = dataclasses.replace(Owner.this_process(), namespace="pid:[1]", pid=1 << 30)
        (Path(far) / "owner.json").write_text(owner.text())
        with scratch_folder():
            assert Path(far).is_dir()
            assert Path(no).is_dir()
