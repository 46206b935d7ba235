"""Six steps straight, and three, kill -9, three: the same to the bit. And a signal saves and says how to go on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoints.resume import ResumeError, choose_start, differences
from pipeline.checkpoints.store import CheckpointStore, progress_of, read_progress
from pipeline.commands.main import main
from pipeline.config import load_config
from pipeline.observe.report.page import write_report
from pipeline.rollout.admission import Admission
from pipeline.rollout.saved import Saved
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.types import Episode, Group, Prompt
from tests.support.command import DUMPED, QUICKSTART, SMALL, Command
from tests.support.convert_cli import convert
from tests.support.episodes import plain_rollout

CURSOR = {"prompts": 24, "supervised": 0}
RUN = [*SMALL, *DUMPED, "checkpoint.every_steps=3", "server.deterministic=true", "debug.dump_rollouts=true",
       "run.overwrite=false", "train.steps=9999", "train.lr=1e-4", "checkpoint.keep_last=9", "parallel={}",
       "checks.first_rollouts=0"]  # fmt: skip


def start_of(folder: Path, saved: list[str], now: list[str], *, asked: bool = False):
    """What a run with one configuration is told that finds a checkpoint of another."""
    config = load_config(QUICKSTART, saved)
    store = CheckpointStore(folder / "checkpoints")
    if not store.complete():
        partial = store.begin("step_3")
        (partial / "checksums.json").write_text("{}")
        assert config.model.tiny is not None
        (partial / "hf").mkdir()
        (partial / "hf" / "config.json").write_text(json.dumps(config.model.tiny.hf_config()))
        store.commit(partial, progress_of(config, step=3, supervised=5, version=4, cursor=CURSOR))
    return choose_start(load_config(QUICKSTART, now), store, asked=asked)


def test_a_run_is_resumed_where_it_is_asked_for_or_nothing_is_to_be_overwritten(tmp_path):
    kept, deleted = ["run.overwrite=false"], ["run.overwrite=true"]
    assert start_of(tmp_path, [], deleted) is None
    for overrides, asked in ((kept, False), (kept, True), (deleted, True)):
        start = start_of(tmp_path, [], overrides, asked=asked)
        assert start is not None
        assert (start.path.name, start.progress.step, start.progress.cursor) == ("step_3", 3, CURSOR)
        (note,) = start.notes
        assert note.startswith(f"resuming from {tmp_path / 'checkpoints' / 'step_3'}: 3 steps are done")


def test_asking_for_what_is_not_there_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path)
    assert choose_start(load_config(QUICKSTART), store, asked=False) is None
    with pytest.raises(ResumeError, match=r"holds no complete checkpoint .* checkpoint\.every_steps=N"):
        choose_start(load_config(QUICKSTART), store, asked=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=1e-6", "train.lr=1e-06 (was 0.0005)"),
        ("objective={preset: grpo}", "objective.preset=grpo (was gspo)"),
        ("data.task.max_digits=7", "data.task.max_digits=7 (was 6)"),
        ("parallel={ranks: 2}", "parallel.ranks=2 (was 1)"),
    ],
)
def test_what_differs_is_said(tmp_path, override, said):
    start = start_of(tmp_path, [], ["run.overwrite=false", override])
    assert start is not None
    assert said in start.notes[1]
    assert (start.notes[-1] == "prompts go on at 24 of the new data") == override.startswith("data.")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.tiny.layers=2", "the model's num_hidden_layers is 4 in it, 2 in the configuration"),
        ("model.tiny.experts=4", "the model's num_experts is 8 in it, 4 in"),
        ("precision.weights=bfloat16", r"precision\.weights is float32 in it, bfloat16 in"),
        ("lora={rank: 4}", "it holds a whole model, and lora is given"),
        ("objective={preset: ppo}", "it holds no critic, which the objective needs"),
        (
            "objective={preset: grpo, kl: {estimator: k3, beta: 0.01}}",
            "it holds no reference, which the objective needs",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused(tmp_path, override, message):
    with pytest.raises(ResumeError, match=message):
        start_of(tmp_path, [], ["run.overwrite=false", override])


def test_a_damaged_checkpoint_and_one_of_another_version_are_refused(tmp_path):
    assert start_of(tmp_path, [], ["run.overwrite=false"])
    file = tmp_path / "checkpoints" / "step_3" / "progress.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"config": tree["config"] | {"gone": 1}}))
    with pytest.raises(ResumeError, match="was saved by another version of sameroute"):
        start_of(tmp_path, [], ["run.overwrite=false"])
    file.write_text("{")
    with pytest.raises(ResumeError, match=r"step_3 is damaged: .*; remove .*step_3 to resume from an older one"):
        start_of(tmp_path, [], ["run.overwrite=false"])


def test_rollouts_made_ahead_are_gone_on_with_left_out_or_refused(tmp_path):
    ahead = ["run.overwrite=false", "rollout.max_staleness=4"]
    start = start_of(tmp_path, ahead, ahead)
    assert start is not None
    assert start.saved is None, "a checkpoint that has none"
    rule = Admission(32, 4, 3, version=4)
    open_ = {}
    for index in range(rule.room):
        rule.admit(index)
        open_[index] = Prompt(np.zeros(1, np.int32), "?", {}, index), {}
    Saved(rule.state(), CURSOR, {}, open_).write(tmp_path / "checkpoints" / "step_3")
    start = start_of(tmp_path, ahead, ahead)
    assert start is not None
    assert start.saved is not None
    assert start.saved.admission == json.loads(json.dumps(rule.state()))
    start = start_of(tmp_path, ahead, ["run.overwrite=false"])
    assert start is not None
    assert start.saved is None
    assert "128 groups that were sampled ahead are left out: max_staleness is 0" in start.notes
    with pytest.raises(ResumeError, match=r"within 1 versions, 32 a step\. Set rollout\.max_staleness=4"):
        start_of(tmp_path, ahead, ["run.overwrite=false", "rollout.max_staleness=1"])
    (tmp_path / "checkpoints" / "step_3" / "rollouts" / "admission.json").write_text("{")
    with pytest.raises(ResumeError, match=r"rollouts is damaged: .*; remove .*step_3 to resume from an older one"):
        start_of(tmp_path, ahead, ahead)


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("train.lr=1e-6", True),
        ("objective.distillation.coefficient=2", True),
        ("objective.distillation.top_k=5", False),
        ("teacher.path=/another", False),
    ],
)
def test_what_one_teacher_said_of_rollouts_made_ahead_is_not_taken_for_anothers(tmp_path, override, kept):
    ahead = ["run.overwrite=false", "rollout.max_staleness=4", "rollout.prompts_per_step=1", "train.mini_batches=1",
             "teacher.path=/one", "objective.distillation={place: loss, top_k: 4}"]  # fmt: skip
    start_of(tmp_path, ahead, ahead)
    rule = Admission(1, 4, 3, version=4)
    scores = TeacherScores(np.zeros(1, np.float32), np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32))
    open_ = {}
    for index in range(2):
        rule.admit(index)
        rollout = dataclasses.replace(plain_rollout([1], -np.ones(1)), teacher=scores)
        open_[index] = Prompt(rollout.prompt_ids, "?", {}, index), {0: rollout}
    finished = Group(open_[0][0], (Episode((open_.pop(0)[1][0],), reward=1.0),))
    rule.finish(0, 4)
    Saved(rule.state(), CURSOR, {0: finished}, open_).write(tmp_path / "checkpoints" / "step_3")
    start = start_of(tmp_path, ahead, [*ahead, override])
    assert start is not None
    assert start.saved is not None
    rollouts = [*start.saved.finished[0].rollouts, *start.saved.open[1][1].values()]
    assert [rollout.teacher is not None for rollout in rollouts] == [kept] * 2
    assert any("scored again" in note for note in start.notes) != kept


def test_where_files_lie_is_no_difference():
    config = load_config(QUICKSTART).model_dump(mode="json")
    other = load_config(QUICKSTART, ["run.directory=/elsewhere", "checkpoint.keep_last=9", "cluster.cpu_threads=2"])
    assert differences(config, other.model_dump(mode="json")) == []


def rows_of(file: Path) -> list[dict]:
    """Metrics without what the clock says: `waiting` and `kv_used` are read every few seconds, so often by chance."""
    clock = ("time/", "throughput/", "servers/waiting", "servers/kv_used", "devices/", "straggler/", "sync/seconds")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


@dataclasses.dataclass
class Runs:
    """One run directory and its three commands, the last called in this process.

    straight: what it held when the first command was killed, after six steps or more.
    resumed:  what it held when a signal had ended the second, which had gone on from the checkpoint after three.
    said:     by the second and the third, which went on in another layout.
    """

    straight: Path
    resumed: Path
    done: int
    run: Path
    said: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    started: list[Command] = []

    def start(*overrides: str) -> Command:
        started.append(Command(folder, *RUN, *overrides))
        return started[-1]

    try:
        first = start()
        first.wait_for("checkpoints/step_6")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        shutil.copytree(first.run, folder / "straight")
        shutil.rmtree(first.run / "checkpoints" / "step_6")
        (first.run / "checkpoints" / ".step_9.partial").mkdir(exist_ok=True)

        second = start()
        second.wait_for("checkpoints/step_6")
        second.process.send_signal(signal.SIGUSR1)
        assert second.end() == 75, second.text()
        said = [second.text()]
        shutil.copytree(first.run, folder / "resumed")
        found = re.search(r"ended by SIGUSR1 after step (\d+); the same command with --resume goes on", said[0])
        assert found, said[0]
        done = int(found[1])

        dumps = folder / "dumps"
        dumps.mkdir()
        for step in range(1, done + 1):
            shutil.copy(first.run / "dumps" / f"step_{step:06d}.safetensors", dumps)
        overrides = [f"run.directory={first.run}", *RUN, f"train.steps={done}", "parallel={ranks: 2, expert: 2}"]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(["train", QUICKSTART, *overrides, "--from-dump", str(dumps), "--resume"])
        said.append(output.getvalue())
        assert code == 0, said[1]
        # Of the killed one Ray's agents see after some ten seconds that they are alone, on a busy machine later.
        assert [left for command in started for left in command.orphans(60)] == []
        yield Runs(folder / "straight", folder / "resumed", done, first.run, said)
    finally:
        for command in started:
            command.stop()


@pytest.mark.slow
def test_three_steps_a_kill_and_three_more_are_six_steps_straight_bit_for_bit(runs):
    assert "resuming from" in runs.said[0]
    assert "removed .step_9.partial, which was interrupted" in runs.said[0]
    rows, expected = rows_of(runs.resumed / "metrics.jsonl"), rows_of(runs.straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, runs.done + 1))  # no step twice
    assert rows[:6] == expected[:6]
    assert all(row["train/grad_norm"] > 0 and row["reward/std"] > 0 for row in rows[:6])
    dropped = rows_of(runs.resumed / "dropped" / "metrics.jsonl")
    assert dropped == expected[3:]
    # Weights, both moments, generators: every byte that a rank wrote.
    sums = [
        {n: s for n, s in json.loads((d / "checkpoints/step_6/checksums.json").read_text()).items() if "distcp" in n}
        for d in (runs.resumed, runs.straight)
    ]
    assert len(sums[0]) == 1
    assert sums[0] == sums[1]
    for step in (4, 5, 6):
        name = f"dumps/step_{step:06d}.safetensors"
        arrays = [load_file(d / name) for d in (runs.resumed, runs.straight)]  # their order in the file is random
        assert arrays[0].keys() == arrays[1].keys()
        assert all(np.array_equal(arrays[0][key], arrays[1][key]) for key in arrays[0])
    progress = [read_progress(d / "checkpoints" / "step_6") for d in (runs.resumed, runs.straight)]
    assert [(p.step, p.version) for p in progress] == [(6, 7)] * 2
    assert progress[0].cursor == progress[1].cursor
    assert (progress[0].cursor["prompts"], progress[0].cursor["supervised"]) == (48, 320)


@pytest.mark.slow
def test_a_signal_saves_and_ends_with_the_code_for_another_try(runs):
    assert "SIGUSR1: finishing the step, then saving a checkpoint, in 600 s at most" in runs.said[0]
    assert "Traceback" not in runs.said[0]
    assert CheckpointStore(runs.resumed / "checkpoints").latest() == runs.resumed / "checkpoints" / f"step_{runs.done}"
    assert read_progress(runs.resumed / "checkpoints" / f"step_{runs.done}").step == runs.done
    assert not (runs.resumed / "summary.png").exists()


@pytest.mark.slow
def test_another_layout_ends_the_run_and_the_checkpoint_converts_to_its_model(runs, tmp_path):
    assert "parallel.ranks=2 (was 1)" in runs.said[1]
    (answer,) = convert(["to-hf", runs.run / "checkpoints" / f"step_{runs.done}", tmp_path / "hf"])
    assert answer.code == 0, answer
    final, converted = (load_file(d / "model.safetensors") for d in (runs.run / "hf", tmp_path / "hf"))
    assert final.keys() == converted.keys()
    assert all(np.array_equal(final[name], converted[name]) for name in final)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_the_report_shows_one_curve(runs):
    page = write_report(runs.run).read_text()
    assert f"Finished: {runs.done} of {runs.done} steps." in page
    assert "twice" not in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs.resumed / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("reward/mean")] == list(range(1, runs.done + 1))
