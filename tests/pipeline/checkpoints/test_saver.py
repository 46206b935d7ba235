"""A checkpoint counts when it is whole on the disk, whatever the ranks do meanwhile; what cannot be completed is gone.

The ranks here are stand-ins, because real ones do not hang or fail at a given moment.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipeline.checkpoints import saver as saver_module
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Progress
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.trainer.waits import TrainerError


class Ranks:
    """written: set when the files are. error: raised in place of an answer. hang: cleared, and nothing is answered."""

    def __init__(self):
        self.written, self.error, self.hang = threading.Event(), None, threading.Event()
        self.hang.set()

    def begin_save(self, directory: Path) -> None:
        (directory / "checksums.json").write_text("{}")

    def save_written(self) -> bool:
        self.hang.wait()
        if self.error is not None:
            raise self.error
        return self.written.is_set()

    def finish_save(self) -> None:
        """Described."""


def progress(step: int) -> Progress:
    return Progress(step, 0, step, {"prompts": 0, "supervised": 0}, {})


@pytest.fixture
def it(tmp_path, monkeypatch):
    """Store, ranks, saver, what was said."""
    monkeypatch.setattr(saver_module, "_POLL_S", 0.01)
    monkeypatch.setattr(saver_module, "_END_S", 0.3)
    store, ranks, said = CheckpointStore(tmp_path / "checkpoints", keep_last=2), Ranks(), []
    return store, ranks, Saver(store, CheckpointConfig(every_steps=1), ranks, lambda hf: hf.mkdir(), said.append), said


def end_with(saver: Saver, error: BaseException) -> None:
    """A run that ends so while a checkpoint is written."""
    with saver:
        saver.save(progress(1))
        raise error


def until(true, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_counts_as_soon_as_it_is_written_though_nobody_asks(it):
    store, ranks, saver, said = it
    saver.save(progress(1))
    time.sleep(0.1)
    assert store.latest() is None
    ranks.written.set()  # and the step goes on for ever
    until(lambda: store.latest() == store.directory / "step_1")
    until(lambda: said == [f"checkpoint {store.directory / 'step_1'}"])
    saver.poll()


def test_a_failure_is_raised_at_the_next_look_with_the_space_and_the_last_that_is_complete(it):
    store, ranks, saver, _ = it
    ranks.written.set()
    saver.save(progress(1))
    saver.wait()
    ranks.error = TrainerError("trainer rank 0 failed: No space left on device")
    saver.save(progress(2))
    said = (
        r"checkpoint step_2 was not written: trainer rank 0 failed: No space left on device "
        rf"\(.* of .* are free there\); the last complete one is {store.directory / 'step_1'}"
    )
    with pytest.raises(CheckpointError, match=said):
        until(saver.poll)  # which says nothing while all is well
    assert [p.name for p in store.directory.iterdir()] == ["step_1"]
    saver.poll()  # said once


def test_a_run_that_fails_lets_the_checkpoint_in_progress_be_completed(it):
    store, ranks, saver, _ = it
    threading.Timer(0.1, ranks.written.set).start()
    with pytest.raises(TrainerError):
        end_with(saver, TrainerError("of the step after it"))
    assert [p.name for p in store.directory.iterdir()] == ["step_1"]


@pytest.mark.parametrize("end", [TrainerError("hangs"), KeyboardInterrupt()])
def test_what_is_not_completed_when_the_run_ends_is_removed(it, end):
    store, _, saver, _ = it
    begun = time.monotonic()
    with pytest.raises(type(end)):
        end_with(saver, end)
    assert list(store.directory.iterdir()) == []
    assert time.monotonic() - begun < 20


def test_a_rank_that_hangs_keeps_no_signal_waiting(it, monkeypatch):
    store, ranks, saver, _ = it
    monkeypatch.setattr(saver_module, "_STOPPED_S", 0.1)
    monkeypatch.setattr(saver_module, "_END_S", 60)
    ranks.hang.clear()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        end_with(saver, KeyboardInterrupt())
    assert time.monotonic() - begun < 5
    assert list(store.directory.iterdir()) == []
    ranks.hang.set()
    time.sleep(0.1)
    assert list(store.directory.iterdir()) == []


def test_a_checkpoint_that_fails_while_the_run_ends_is_said(it):
    _, ranks, saver, said = it
    ranks.error = TrainerError("rank 0 died")
    with pytest.raises(TrainerError):
        end_with(saver, ranks.error)
    (line,) = said
    assert line.startswith("checkpoint step_1 was not written: rank 0 died (")


def test_a_mistake_of_ours_is_raised_as_it_is(it):
    store, ranks, saver, _ = it
    ranks.error = ZeroDivisionError()
    saver.save(progress(1))
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    assert list(store.directory.iterdir()) == []
