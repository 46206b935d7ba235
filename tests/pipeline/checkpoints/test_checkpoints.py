"""Whatever happens while a checkpoint is written, the run can be resumed: kills, a full disk, damage."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Progress, read_progress
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from tests.support.ranks import run_alone

SMALL = TinyModelConfig(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=2, moe_intermediate=32)
KILLS = 20


def progress(step: int, supervised: int = 0) -> Progress:
    return Progress(step, supervised, step, {"prompts": 8 * step, "supervised": 0}, {"train": {"lr": 1.0}})


def write(store: CheckpointStore, it: Progress) -> Path:
    """A checkpoint as far as the store knows them."""
    partial = store.begin(it.name)
    (partial / "data").write_text("12345")
    (partial / "checksums.json").write_text(json.dumps({"data": [5, 0]}))
    return store.commit(partial, it)


def test_the_newest_is_the_one_of_most_steps_and_only_the_last_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    assert store.latest() is None
    for it in (progress(0, 9), progress(0, 10), progress(9), progress(10), progress(100)):
        assert write(store, it) == store.latest()
        assert read_progress(store.latest()) == it
    assert sorted(os.listdir(store.directory)) == ["step_10", "step_100"]


def test_the_best_stays_under_its_name_however_old_until_another_is_better(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)

    def with_best(step: int, best: int) -> Progress:
        return dataclasses.replace(progress(step), evaluations={"done": {}, "best": {"step": best, "value": 0.5}})

    write(store, with_best(1, 0))  # the model that the run began with is best so far
    assert store.best is None
    for step, best, left in ((2, 2, [2]), (3, 2, [2, 3]), (9, 2, [2, 9]), (10, 10, [10]), (11, 10, [10, 11])):
        write(store, with_best(step, best))
        assert [path.name for path in store.complete()] == [f"step_{n}" for n in left]
        assert store.best == (store.directory / f"step_{best}").resolve()
        assert store.latest() == store.directory / f"step_{step}"
        assert read_progress(store.directory / "best").step == best
    (store.directory / ".best.partial").symlink_to("step_11")  # interrupted
    assert store.clean() == [".best.partial"]
    assert (store.directory / "step_11").is_dir()


def test_a_run_that_ends_with_an_error_leaves_nothing_half_written_and_what_is_complete(tmp_path):
    """Also a rank's file that came after the checkpoint was given up."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=5)

    def ends(name: str, *, ours: bool) -> None:
        with store.in_use(lambda: ours):
            write(store, progress(1))
            (store.begin(name) / "__0_0.distcp").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends("step_2", ours=False)
    assert sorted(os.listdir(store.directory)) == [".step_2.partial", "step_1"], "it may be another run's by now"
    shutil.rmtree(store.directory)
    with pytest.raises(KeyboardInterrupt):
        ends("step_2", ours=True)
    assert os.listdir(store.directory) == ["step_1"]
    with store.in_use(lambda: True):
        write(store, progress(3))
    assert sorted(os.listdir(store.directory)) == ["step_1", "step_3"]


def test_an_older_checkpoint_goes_only_when_the_newer_is_complete(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    write(store, progress(1))
    partial = store.begin("step_2")
    (partial / "data").write_text("123")
    assert store.latest() == tmp_path / "step_1"
    assert store.complete() == [tmp_path / "step_1"]
    store.begin("step_2")  # again, after an interruption
    write(store, progress(2))
    assert store.complete() == [tmp_path / "step_2"]


def test_what_was_interrupted_is_never_picked_up_and_is_removed_by_name(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, progress(1))
    shutil.copytree(tmp_path / "step_1", tmp_path / ".step_2.partial")
    shutil.copytree(tmp_path / "step_1", tmp_path / ".step_0.removed")
    (tmp_path / "notes").mkdir()
    assert store.latest() == tmp_path / "step_1"
    assert store.clean() == [".step_0.removed", ".step_2.partial"]
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_1"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: (it / "progress.json").write_text("{"), "is damaged: "),
        (lambda it: (it / "progress.json").unlink(), "is damaged: "),
        (lambda it: (it / "progress.json").write_text('{"format": 1}'), "is damaged: "),
        (lambda it: (it / "progress.json").write_text('{"format": 2}'), "of another version"),
        (lambda it: (it / "data").unlink(), "data is missing, of 5 bytes"),
        (lambda it: (it / "data").write_text("123"), "data has 3, of 5 bytes"),
        (lambda it: (it / "checksums.json").unlink(), "is damaged: "),
    ],
)
def test_damage_is_named_before_anything_starts(tmp_path, damage, message):
    it = write(CheckpointStore(tmp_path), progress(1))
    damage(it)
    with pytest.raises(CheckpointError, match=message):
        read_progress(it)


class Local:
    """One trainer rank in this process, called as a TrainerGroup is."""

    def __init__(self, model: str, folder: Path):
        from megatron_ext import parallel
        from megatron_ext.trainer import Trainer
        from pipeline.trainer.rank import TrainerRank

        meeting = folder / f"meeting_{os.getpid()}"
        parallel.initialize(ParallelConfig(), rank=0, init_method=f"file://{meeting}", timeout_s=60)
        self.rank = TrainerRank.__new__(TrainerRank)  # without its log file
        self.rank.trainer = Trainer(model, ParallelConfig(), TrainerConfig(), OptimizerConfig(lr=1e-3), replay=True)

    def resume(self, checkpoint: Path) -> None:
        self.rank.resume(str(checkpoint))

    def begin_save(self, directory: Path) -> None:
        self.rank.begin_save(str(directory))

    def save_written(self) -> bool:
        return self.rank.save_written()

    def finish_save(self) -> None:
        self.rank.describe_save([self.rank.saved_part()])

    def state(self):
        """Every weight and both moments of each."""
        network = self.rank.trainer.policy
        for optimizer in network.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                yield from state.values()
        for chunk in network.chunks:
            yield from chunk.parameters()

    def become(self, number: int) -> None:
        """As after update `number`: everything in it is that number."""
        import torch

        network = self.rank.trainer.policy
        network.steps = number
        with torch.no_grad():
            for optimizer in network.optimizer.chained_optimizers:
                if not optimizer.optimizer.state:
                    optimizer.load_state_dict(optimizer.state_dict())
                for group in optimizer.optimizer.param_groups:
                    group["step"] = number
            for tensor in self.state():
                tensor.fill_(number)

    def values(self) -> set[float]:
        steps = {
            float(g["step"])
            for o in self.rank.trainer.policy.optimizer.chained_optimizers
            for g in o.optimizer.param_groups
        }
        return steps | {float(v) for tensor in self.state() for v in tensor.unique()}


def saver_of(store: CheckpointStore, trainers: Local):
    from pipeline.checkpoints.saver import Saver

    return Saver(store, CheckpointConfig(every_steps=1), trainers, lambda hf: hf.mkdir())  # pyright: ignore[reportArgumentType]


def save_until_killed(model: str, folder: Path, reports) -> None:
    """Runs in a process of its own: resume, say from where and what was found, then save for ever."""
    import torch

    torch.set_num_threads(1)
    store = CheckpointStore(folder / "checkpoints", keep_last=2)
    removed, latest, step = store.clean(), store.latest(), 0
    trainers = Local(model, folder)
    trainers.become(0)
    if latest is not None:
        trainers.resume(latest)
        step = read_progress(latest).step
    reports.put((removed, step, trainers.values()))
    saver, saves, start = saver_of(store, trainers), 0, time.monotonic()
    while True:
        step, saves = step + 1, saves + 1
        trainers.become(step)
        saver.save(progress(step))
        if saves == 2:  # so the first is complete
            reports.put((time.monotonic() - start) / saves)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("small"), SMALL, 0))


def killed_again_and_again(model: str, folder: Path):
    """Runs in a process of its own, which has imported everything and forks the run again after each kill."""
    import multiprocessing

    import pipeline.checkpoints.saver  # noqa: F401

    context, moments, seen = multiprocessing.get_context("fork"), random.Random(0), []
    for kill in range(KILLS + 1):
        reports = context.SimpleQueue()
        process = context.Process(target=save_until_killed, args=(model, folder, reports))
        process.start()
        seen.append(reports.get())
        if kill < KILLS:
            time.sleep(reports.get() * moments.random() * 2)
        process.kill()
        process.join()
    return seen


def test_a_run_killed_at_twenty_random_moments_of_saving_resumes_each_time(model, tmp_path):
    (seen,) = run_alone(killed_again_and_again, model, tmp_path)
    steps = [step for _, step, _ in seen]
    assert [values for *_, values in seen] == [{step} for step in steps]  # never a mixture of two states
    assert len(steps) == KILLS + 1
    assert steps == sorted(steps)
    assert steps[-1] > KILLS
    interrupted = [removed for removed, *_ in seen if any(name.endswith(".partial") for name in removed)]
    assert len(interrupted) >= KILLS // 2  # the kills did come in the middle of saves


def save_to_a_full_disk_and_memory(model: str, folder: Path):
    """What is said, what is left, and what resumes."""
    from megatron_ext.checkpoint import rank_file

    def out_of_memory(_):
        raise MemoryError("no memory left")

    store = CheckpointStore(folder / "checkpoints", keep_last=1)
    trainers = Local(model, folder)
    saver = saver_of(store, trainers)
    trainers.become(1)
    saver.save(progress(1))
    saver.wait()
    begin = store.begin

    def begin_on_a_full_disk(name: str) -> Path:
        partial = begin(name)
        (partial / "__0_0.distcp").symlink_to("/dev/full")
        return partial

    store.begin = begin_on_a_full_disk
    trainers.become(2)
    saver.save(progress(2))
    said = ""
    try:
        saver.save(progress(3))
    except CheckpointError as error:
        said = str(error)
    store.begin = begin
    serialized, rank_file.serialized = rank_file.serialized, out_of_memory
    try:
        saver.save(progress(2))
        saver.wait()
    except MemoryError as error:  # of a rank in a process of its own it would be a TrainerError
        said += f"; {error}"
    rank_file.serialized = serialized
    latest = store.latest()
    assert latest is not None
    trainers.resume(latest)
    return said, store.complete() == [latest], trainers.values()


def test_a_full_disk_or_memory_is_an_error_and_costs_no_earlier_checkpoint(model, tmp_path):
    ((said, only_the_first, values),) = run_alone(save_to_a_full_disk_and_memory, model, tmp_path)
    assert "checkpoint step_2 was not written: [Errno 28] No space left on device" in said
    assert f"the last complete one is {tmp_path / 'checkpoints' / 'step_1'}" in said
    assert said.endswith("; no memory left")
    assert only_the_first
    assert values == {1.0}
