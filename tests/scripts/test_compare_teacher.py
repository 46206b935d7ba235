"""A teacher and rewards are compared on equal terms, and what the table says is in the runs."""

from __future__ import annotations

import pytest

from pipeline.config import load_config
from scripts import compare_teacher
from scripts.compare_teacher import CONFIGS, SCORE, WAYS, curve, reached, row_of, settings_of
from scripts.kept_runs import KeptRun, keep

ROWS = [
    {"step": 0, SCORE: 0.1},
    {"step": 1, "time/step_s": 2.0},
    {"step": 2, "time/step_s": 3.0, SCORE: 0.55},
    {"step": 3, "time/step_s": 1.0, SCORE: 0.85},
]


def test_ways_differ_in_what_they_learn_from_alone(tmp_path):
    runs = {w: load_config(CONFIGS / "student.yaml", settings_of(w, 2, tmp_path, ["train.steps=7"])) for w in WAYS}
    same = [
        (
            run.rollout.prompts_per_step * run.rollout.samples_per_prompt,
            run.train.steps,
            *(run.supervised, run.model, run.data, run.run.seed, run.evaluate),
        )
        for run in runs.values()
    ]
    assert same[0] == same[1] == same[2]
    learns = {
        way: (run.teacher and run.teacher.path, run.objective.distillation and run.objective.distillation.reward)
        for way, run in runs.items()
    }
    taught = tmp_path / "teacher"
    assert learns == {"rewards": (None, None), "teacher": (taught, 0.0), "both": (taught, 1.0)}
    quickstart = load_config(CONFIGS.parent / "quickstart.yaml")
    rewards = runs["rewards"]
    assert rewards.objective == quickstart.objective
    assert rewards.train.mini_batches == quickstart.train.mini_batches
    assert rewards.model == quickstart.model == runs["teacher"].model
    teacher = load_config(CONFIGS / "teacher.yaml")
    assert teacher.model.tiny != quickstart.model.tiny


def test_a_curve_counts_the_seconds_of_every_step_before_it():
    run = KeptRun(ROWS, None)
    assert curve(run) == [(0, 0.0, 0.1), (2, 5.0, 0.55), (3, 6.0, 0.85)]
    assert [reached(run, a) for a in (0.1, 0.5, 0.8, 0.9)] == [(0, 0.0), (2, 5.0), (3, 6.0), None]


def test_a_row_is_of_whole_runs_and_says_how_many_came_there():
    slow = KeptRun([*ROWS[:3], {"step": 3, "time/step_s": 1.0, SCORE: 0.65}], None)
    cells = row_of("teacher", [KeptRun(ROWS, None), slow, KeptRun(ROWS[:2], "out of memory")])
    assert cells == [
        "teacher", "0.100", "0.750", "0.850, 0.650, broken", "2 steps, 5 s", "3 steps, 6 s (1 of 2)", "never", "2.00",
    ]  # fmt: skip
    assert row_of("both", [KeptRun([], "no server")])[3] == "broken"


def test_the_table_of_what_is_there_starts_nothing(tmp_path, monkeypatch, capsys):
    for way in WAYS:
        keep(tmp_path / f"{way}_seed_0.json", settings_of(way, 0, tmp_path, []), lambda: ROWS)
    monkeypatch.setattr("sys.argv", ["compare_teacher", str(tmp_path), "--table", "--figure", str(tmp_path)])
    monkeypatch.setattr(compare_teacher, "train", lambda *_: pytest.fail("a run was made"))
    compare_teacher.main()
    assert capsys.readouterr().out.count(" | 0.850 | 0.850 | 2 steps, 5 s | 3 steps, 6 s | never | 2.00 |") == 3
    assert (tmp_path / "compare_teacher.png").stat().st_size > 5_000
