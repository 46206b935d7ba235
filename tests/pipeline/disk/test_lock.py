"""One run at a time in a directory, and a dead owner stands in nobody's way."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.disk import lock as lock_module
from pipeline.disk.disk_errors import DiskError, RunDirectoryError
from pipeline.disk.lock import NAME, hold, refuse_held
from pipeline.disk.owner import Owner

HOLD = """
import sys, time
from pathlib import Path
from pipeline.disk.lock import hold
with hold(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""
RACE = """
import sys, time
from pathlib import Path
from pipeline.disk.disk_errors import RunDirectoryError
from pipeline.disk.lock import hold
folder, moment = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, moment - time.time()))
try:
    with hold(folder, print):
        print("held", flush=True)
        sys.stdin.read()
except RunDirectoryError:
    print("refused", flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_S", 0.1)
    monkeypatch.setattr(lock_module, "SILENT_S", 1.0)
    monkeypatch.setattr(lock_module, "_WRITTEN_S", 0.1)


def test_a_second_run_is_refused_with_the_name_of_the_first(holder, tmp_path):
    said = rf"a run is going on in {tmp_path}: process {holder.pid} on \S+, since 20.*; wait for its end"
    with pytest.raises(RunDirectoryError, match=said), hold(tmp_path, print):
        pass
    with pytest.raises(RunDirectoryError, match=said):
        refuse_held(tmp_path)


def test_an_owner_that_was_killed_blocks_nobody_reaped_or_not(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Owner.read(tmp_path / NAME).alive:  # nobody has waited for it: a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refuse_held(tmp_path)
    with hold(tmp_path, print) as lock:
        lock.check()
        assert Owner.read(tmp_path / NAME).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path):
    later = dataclasses.replace(Owner.this_process(), started=1)
    (tmp_path / NAME).write_text(later.text())
    with hold(tmp_path, print) as lock:
        lock.check()


def test_of_many_that_find_a_dead_lock_one_gets_it(holder, tmp_path):
    holder.kill()
    holder.wait()
    moment = str(time.time() + 2.5)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, tmp_path, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    said = sorted(process.stdout.readline() for process in racers if process.stdout is not None)
    for process in racers:
        process.communicate(timeout=60)
    assert said == ["held\n", *["refused\n"] * 7]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [{"boot": "another", "host": "far"}, {"namespace": "pid:[1]"}])
def test_an_owner_elsewhere_is_known_by_its_touch(tmp_path, quick, where):
    file, said = tmp_path / NAME, []
    far = dataclasses.replace(Owner.this_process(), **where)
    file.write_text(far.text())
    over = threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunDirectoryError, match=rf"on {far.host}.*If that run is gone, remove {file}"):
        hold(tmp_path, said.append).__enter__()
    over.set()
    thread.join()
    with hold(tmp_path, said.append):
        pass
    assert len(said) == 2
    assert said[0] == f"{file} is of {far}: waiting 1 s at most for a sign of life"


@pytest.mark.parametrize("text", ["", '{"host": "a', "[]"])
def test_a_lock_that_was_not_written_whole_holds_for_a_moment_only(tmp_path, quick, text):
    (tmp_path / NAME).write_text(text)
    with hold(tmp_path, print) as lock:
        lock.check()


def test_a_right_to_remove_whose_owner_died_too_blocks_nobody(holder, tmp_path):
    holder.kill()
    holder.wait()
    dead = Owner.read(tmp_path / NAME)
    (tmp_path / f"{NAME}.{dead.token}").write_text(dead.text())
    with hold(tmp_path, print) as lock:
        lock.check()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_touches_its_lock_and_sees_that_it_lost_it(tmp_path, quick):
    file = tmp_path / NAME
    with hold(tmp_path, print) as lock:
        before, deadline = file.stat().st_mtime_ns, time.monotonic() + 10
        while file.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        other = Owner.this_process()
        file.write_text(other.text())
        with pytest.raises(DiskError, match=f"another run has taken {tmp_path}: process {os.getpid()}"):
            lock.check()
    assert json.loads(file.read_text())["token"] == other.token  # not ours to remove


def test_a_directory_that_is_gone_is_told(tmp_path, quick):
    folder = tmp_path / "run"
    folder.mkdir()
    with hold(folder, print) as lock:
        (folder / NAME).unlink()
        folder.rmdir()
        with pytest.raises(DiskError, match=f"{folder} was removed or moved while the run wrote there"):
            lock.check()
