"""Six steps straight, and three, kill -9, three: the same to the bit. And a signal saves and says how to go on."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoints import CheckpointStore, progress_of, read_progress
from pipeline.config import load_config
from pipeline.observe.report.page import write_report
from pipeline.resume import ResumeError, choose_start, differences
from tests.megatron_ext.convert.cli import convert
from tests.pipeline.test_session import DUMPED, QUICKSTART, SMALL, Command

CURSOR = {"prompts": 24, "supervised": 0}
RUN = [*SMALL, *DUMPED, "checkpoint.every_steps=3", "server.deterministic=true", "debug.dump_rollouts=true",
       "run.overwrite=false", "train.steps=6"]  # fmt: skip


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
        assert note.startswith(f"resuming from {tmp_path / 'checkpoints' / 'step_3'}: 3 steps are done, later rows")


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
        ("trainer.dtype=bfloat16", r"trainer\.dtype is float32 in it, bfloat16 in"),
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


def test_where_files_lie_is_no_difference():
    config = load_config(QUICKSTART).model_dump(mode="json")
    other = load_config(QUICKSTART, ["run.directory=/elsewhere", "checkpoint.keep_last=9", "cluster.cpu_threads=2"])
    assert differences(config, other.model_dump(mode="json")) == []


def rows_of(file: Path) -> list[dict]:
    """Metrics without what the clock says."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


@dataclasses.dataclass
class Killed:
    """straight: what the run had when it was killed. resumed: the same directory after the second run."""

    straight: Path
    resumed: Command


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Six steps in one process, then kill -9. Back to the checkpoint after three, and three more in another process."""
    folder = tmp_path_factory.mktemp("killed")
    first = Command(folder, *RUN, "train.steps=9999", "train.decay_steps=null")
    runs = [first]
    try:
        first.wait_for("checkpoints/step_6")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        straight = folder / "straight"
        shutil.copytree(first.run, straight)
        shutil.rmtree(first.run / "checkpoints" / "step_6")
        (first.run / "checkpoints" / ".step_9.partial").mkdir(exist_ok=True)
        runs.append(Command(folder, *RUN))
        assert runs[1].end(240) == 0, runs[1].text()
        assert first.orphans() == []  # Ray's agents take some ten seconds to see that they are alone
        yield Killed(straight, runs[1])
    finally:
        for run in runs:
            run.stop()


@pytest.mark.slow
def test_three_steps_a_kill_and_three_more_are_six_steps_straight_bit_for_bit(killed):
    run, straight = killed.resumed.run, killed.straight
    assert "resuming from" in killed.resumed.text()
    assert "removed .step_9.partial, which was interrupted" in killed.resumed.text()
    rows, expected = rows_of(run / "metrics.jsonl"), rows_of(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # no step twice
    assert rows == expected[:6]
    assert all(row["train/grad_norm"] > 0 and row["reward/std"] > 0 for row in rows)
    dropped = rows_of(run / "dropped" / "metrics.jsonl")
    assert dropped == expected[3 : 3 + len(dropped)]
    assert len(dropped) >= 3
    # Weights, both moments, generators: every byte that either process wrote.
    sums = [json.loads((d / "checkpoints" / "step_6" / "checksums.json").read_text()) for d in (run, straight)]
    assert {n: s for n, s in sums[0].items() if n.endswith(".distcp")} == {
        n: s for n, s in sums[1].items() if n.endswith(".distcp")
    }
    for step in (4, 5, 6):
        name = f"step_{step:06d}.safetensors"
        assert (run / "dumps" / name).read_bytes() == (straight / "dumps" / name).read_bytes()
    progress = [read_progress(d / "checkpoints" / "step_6") for d in (run, straight)]
    assert [(p.step, p.version, p.cursor) for p in progress] == [(6, 7, {"prompts": 48, "supervised": 320})] * 2
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_3", "step_6"]


@pytest.mark.slow
def test_the_report_shows_one_curve_and_the_checkpoint_converts_to_the_model(killed, tmp_path):
    run = killed.resumed.run
    page = write_report(run).read_text()
    assert "Finished: 6 of 6 steps." in page
    assert "twice" not in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("reward/mean")] == [1, 2, 3, 4, 5, 6]
    (answer,) = convert(["to-hf", run / "checkpoints" / "step_6", tmp_path / "hf"])
    assert answer.code == 0, answer
    final, converted = (load_file(d / "model.safetensors") for d in (run / "hf", tmp_path / "hf"))
    assert final.keys() == converted.keys()
    assert all(np.array_equal(final[name], converted[name]) for name in final)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_signal_saves_and_another_layout_goes_on_to_the_same_model(killed, tmp_path):
    """On the rollouts of the run above, so that no server is needed."""
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    for step in range(1, 7):
        shutil.copy(killed.resumed.run / "dumps" / f"step_{step:06d}.safetensors", dumps)
    settings = [*RUN, "debug.dump_rollouts=false", "checkpoint.every_steps=100", "--from-dump", str(dumps)]
    run = Command(tmp_path, *settings)
    runs = [run]
    try:
        run.wait_for("step 1/6")
        run.process.send_signal(signal.SIGUSR1)
        assert run.end() == 75, run.text()
        assert run.orphans() == []
        assert "SIGUSR1: finishing the step, then saving a checkpoint, in 600 s at most" in run.text()
        done = re.search(r"ended by SIGUSR1 after step (\d); the same command with --resume goes on from", run.text())
        assert done, run.text()
        assert 1 <= int(done[1]) < 6
        runs.append(Command(tmp_path, *settings, "parallel={}", "--resume"))
        assert runs[1].end(240) == 0, runs[1].text()
        assert "changed since" in runs[1].text()
        assert "parallel.ranks=1 (was 2)" in runs[1].text()
        assert runs[1].orphans() == []
    finally:
        for one in runs:
            one.stop()
    rows, expected = (rows_of(d / "metrics.jsonl") for d in (run.run, killed.resumed.run))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows, expected, strict=True):
        exact = row["step"] <= int(done[1])
        for key in ("reward/mean", "loss/objective", "train/grad_norm", "train/lr", "policy/entropy"):
            assert row[key] == (other[key] if exact else pytest.approx(other[key], rel=1e-5, abs=1e-5))
    final, converted = (load_file(d / "hf" / "model.safetensors") for d in (run.run, killed.resumed.run))
    assert max(np.abs(final[name] - converted[name]).max() for name in final) < 1e-5
