import json

import numpy as np
import pytest
import yaml

from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.observe.run_dir import RunDirectory, RunDirectoryError
from pipeline.types import Prompt
from tests.support.episodes import graded_group, plain_rollout, step_result

METRICS = {"reward/mean": 0.5, "mismatch/k3": 1e-9, "mismatch/abs_logprob": 1e-6, "response/length_mean": 6.0}
GSPO = resolve(ObjectiveConfig(preset="gspo"))
CONFIG = {"train": {"steps": 3}, "run": {"seed": 0}}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_on_disk_as_soon_as_a_step_is_recorded(tmp_path):
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run.record({"step": 1, **METRICS})
        run.record({"step": np.int64(2), **METRICS, "reward/mean": np.float32(0.25)})
        rows = read(run.metrics_path)
    assert rows == [{"step": 1, **METRICS}, {"step": 2, **METRICS, "reward/mean": 0.25}]
    assert isinstance(rows[1]["step"], int)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == CONFIG
    assert (tmp_path / "run" / "logs").is_dir()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_finite_number_is_refused_by_its_key_and_not_written(value, tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        with pytest.raises(ValueError, match="step 1: the metric 'mismatch/k3' is"):
            run.record({"step": 1, **METRICS, "mismatch/k3": value})
        assert run.metrics_path.read_text() == ""


def test_a_step_needs_its_number(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run, pytest.raises(ValueError, match='need the key "step"'):
        run.record(METRICS)


def test_a_resumed_run_puts_later_evaluations_aside(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        for step in (1, 2, 3):
            run.record({"step": step, **METRICS})
        for step in (0, 2, 3):
            run.record_evaluation({"step": step, "set": "held"}, [{"question": step}])
        run.record_evaluation({"step": 3, "set": "other", "skipped": "SIGTERM"}, None)
    with RunDirectory(tmp_path, CONFIG, resume_after=2) as run:
        run.record_evaluation({"step": 2, "set": "late"}, [])
    assert [row["step"] for row in read(tmp_path / "evaluations.jsonl")] == [0, 2, 2]
    assert sorted(p.name for p in (tmp_path / "evaluations" / "held").iterdir()) == [
        "step_000000.jsonl",
        "step_000002.jsonl",
    ]
    assert [row["set"] for row in read(tmp_path / "dropped" / "evaluations.jsonl")] == ["held", "other"]
    assert read(tmp_path / "dropped" / "evaluations" / "held" / "step_000003.jsonl") == [{"question": 3}]


def test_tensorboard_reads_every_metric_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDirectory(tmp_path, CONFIG) as run:
        for step, reward in ((1, 0.25), (2, 0.75)):
            run.record({"step": step, **METRICS, "reward/mean": reward})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(METRICS)
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]


def test_finish_draws_the_summary_of_a_run_with_steps(tmp_path):
    with RunDirectory(tmp_path / "a", CONFIG) as run:
        run.record({"step": 1, **METRICS})
        run.finish()
    with RunDirectory(tmp_path / "b", CONFIG) as empty:
        empty.finish()
    assert (tmp_path / "a" / "summary.png").is_file()
    assert not (tmp_path / "b" / "summary.png").exists()


def test_another_run_is_refused_and_left_as_it_is(tmp_path):
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run.record({"step": 1, **METRICS})
    with pytest.raises(RunDirectoryError, match=r"holds a run already; set run\.directory .*run\.overwrite=true"):
        RunDirectory(tmp_path / "run", CONFIG)
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


def test_rows_that_a_resumed_run_moves_aside_are_said_and_only_where_there_are_any(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        for step in (1, 2, 3):
            run.record({"step": step, **METRICS})
    said = []
    with RunDirectory(tmp_path, CONFIG, resume_after=3, say=said.append):
        assert said == []
    with RunDirectory(tmp_path, CONFIG, resume_after=1, say=said.append):
        assert said == [f"2 rows of steps after 1 were moved to {tmp_path / 'dropped'}"]


def test_overwriting_deletes_the_run_that_was_there(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.record({"step": 1, **METRICS})
        (run.logs / "sglang.log").write_text("old")
    with RunDirectory(tmp_path, CONFIG, overwrite=True) as run:
        assert run.metrics_path.read_text() == ""
        assert list(run.logs.iterdir()) == []
        assert list((tmp_path / "tensorboard").iterdir()) == []


def test_overwriting_never_deletes_what_no_run_has_written(tmp_path):
    with RunDirectory(tmp_path, CONFIG):
        pass
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(RunDirectoryError, match=r"no run has written \(thesis\.tex\)"):
        RunDirectory(tmp_path, CONFIG, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert (tmp_path / "config.yaml").is_file()


def test_names_of_a_run_without_its_config_are_not_taken_for_a_run(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(RunDirectoryError, match=r"no run has written \(model\)"):
        RunDirectory(tmp_path, CONFIG, overwrite=True)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="run is a file"):
        RunDirectory(tmp_path / "run", CONFIG)


def test_hf_directory_holds_everything_of_a_model_but_its_weights_and_names_the_dtype_that_a_run_writes(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tf_model.h5"):
        (model / name).write_text(name)
    (model / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        hf = run.hf_directory(model, "float32")
    assert sorted(p.name for p in hf.iterdir()) == ["config.json", "tokenizer.json"]
    assert json.loads((hf / "config.json").read_text()) == {"dtype": "float32"}


def test_a_step_shows_as_many_rollouts_as_asked_for(tmp_path):
    class Digits:
        def decode(self, ids, skip_special_tokens=True):
            return "".join(map(str, ids))

    rollout = plain_rollout([1, 2], np.zeros(2))
    groups = [graded_group(Prompt(np.zeros(1, np.int32), f"question {n}", index=n), [rollout], [1.0]) for n in range(4)]
    rows = [np.zeros(2, np.float32)] * 4
    result = step_result(12, groups, rows, rows, rows, [0.0] * 4, np.zeros((0, 4), np.int64))
    with RunDirectory(tmp_path / "a", CONFIG, rollouts_shown=2) as run:
        run.write_step(result, GSPO, Digits())
    text = (tmp_path / "a" / "rollouts" / "step_000012.txt").read_text()
    assert text.count("=== prompt") == 2
    assert "question 2" in text
    with RunDirectory(tmp_path / "b", CONFIG, rollouts_shown=0) as run:
        run.write_step(result, GSPO, Digits())
    assert list((tmp_path / "b" / "rollouts").iterdir()) == []


def test_resuming_moves_what_came_after_the_checkpoint_aside(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        for step in (1, 2, 3, 4):
            run.record({"step": step, **METRICS})
            (tmp_path / "rollouts" / f"step_{step:06d}.txt").write_text(str(step))
        run.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # killed in the middle of a row
    with RunDirectory(tmp_path, {"train": {"steps": 9}}, resume_after=2) as run:
        assert [row["step"] for row in read(run.metrics_path)] == [1, 2]
        assert not (tmp_path / "summary.png").exists()
        run.record({"step": 3, **METRICS, "reward/mean": 0.75})
        run.to_disk()
    assert [row["reward/mean"] for row in read(tmp_path / "metrics.jsonl")] == [0.5, 0.5, 0.75]
    dropped = (tmp_path / "dropped" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped[:2]] == [3, 4]
    assert dropped[2] == '{"step": 5, "rew'
    assert sorted(f.name for f in (tmp_path / "rollouts").iterdir()) == ["step_000001.txt", "step_000002.txt"]
    assert (tmp_path / "dropped" / "rollouts" / "step_000004.txt").read_text() == "4"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"train": {"steps": 9}}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.5), (3, 0.75)]


def test_a_run_can_be_resumed_a_second_time_and_from_before_its_first_step(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.record({"step": 1, **METRICS})
    for _ in range(2):
        with RunDirectory(tmp_path, CONFIG, resume_after=0) as run:
            assert read(run.metrics_path) == []
            run.record({"step": 1, **METRICS})
    assert len(read(tmp_path / "dropped" / "metrics.jsonl")) == 2
