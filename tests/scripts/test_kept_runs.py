"""The runs of a benchmark are made once, whole or broken, and a broken one is in the table."""

from __future__ import annotations

import pytest

from pipeline.config import load_config
from pipeline.errors import SamerouteError
from scripts import bench_staleness, compare_objectives
from scripts.compare_objectives import CONFIG, OBJECTIVES, Cell, cells
from scripts.kept_runs import KeptRun, keep, look

ROWS = [{"reward/mean": i / 10, "loss/clip_fraction": 0.5, "mismatch/max_abs_logprob": 0.2} for i in range(12)]


def test_a_run_is_made_once_and_its_steps_are_kept(tmp_path):
    made = []
    for _ in range(2):
        run = keep(tmp_path / "out" / "one.json", ["a=1"], lambda: made.append(1) or iter(ROWS))
        assert run == KeptRun(ROWS, None)
    assert made == [1]
    assert run.first(2) == pytest.approx(0.05)
    assert run.last(2) == pytest.approx(1.05)
    assert (run.mean("loss/clip_fraction"), run.largest("reward/mean")) == (0.5, 1.1)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["one.json"]


def _breaks(error: BaseException):
    yield ROWS[0]
    raise error


def test_a_broken_run_is_kept_with_its_sentence_and_not_tried_again(tmp_path):
    file = tmp_path / "one.json"
    assert keep(file, [], lambda: _breaks(SamerouteError("the engines disagree"))) == KeptRun(
        ROWS[:1], "the engines disagree"
    )
    assert keep(file, [], lambda: pytest.fail("made again")).broken == "the engines disagree"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_a_run_that_is_killed_or_a_mistake_of_the_code_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        keep(tmp_path / "one.json", [], lambda: _breaks(error))
    assert look(tmp_path / "one.json", []) is None


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    keep(tmp_path / "one.json", ["train.lr=1e-3"], lambda: ROWS)
    with pytest.raises(SystemExit, match=r"made with other settings, train.lr=1e-3; give another folder"):
        keep(tmp_path / "one.json", ["train.lr=5e-4"], lambda: ROWS)


def test_means_are_of_whole_runs_and_a_broken_one_is_named():
    whole, worse = KeptRun(ROWS, None), KeptRun([row | {"reward/mean": 0.0} for row in ROWS], "out of memory")
    assert bench_staleness.row_of([whole, worse]) == ["0.0", "0.200", "0.900", "0.900, broken"]
    row = compare_objectives.row_of(Cell("gspo", 0, "r3"), [whole, worse])
    assert row[:6] == ["gspo", "0", "r3", "0", "0.650", "0.650, broken"]
    assert compare_objectives.row_of(Cell("gspo", 0, "r3"), [worse])[4:6] == ["", "broken"]
    assert bench_staleness.row_of([worse])[3] == "broken"


def test_every_cell_of_the_comparison_is_a_run_that_starts():
    chosen = cells(list(OBJECTIVES), [0, 1, 4])
    assert len({cell.name(0) for cell in chosen}) == len(chosen) == 15 + 8
    for cell in chosen:
        config = load_config(CONFIG, cell.settings(3, []))
        assert (config.objective.preset, config.rollout.max_staleness) == (cell.objective, cell.staleness)
        assert (config.replay, config.run.seed, config.precision.rollout_weights) == (cell.replay, 3, "int8")
    assert {(c.objective, c.staleness, c.replay) for c in chosen if c.replay != "r3"} == {
        (name, bound, replay) for name in ("gspo", "minirl") for bound in (0, 4) for replay in ("none", "r2")
    }


def test_the_table_of_what_is_there_starts_nothing(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        cell = Cell("gspo", 0, "r3")
        sentence = "the servers ended" if seed else None
        keep(tmp_path / f"{cell.name(seed)}.json", cell.settings(seed, []), lambda s=sentence: _rows(s))
    monkeypatch.setattr("sys.argv", ["compare_objectives", str(tmp_path), "--table", "--figure", str(tmp_path)])
    monkeypatch.setattr(compare_objectives.Session, "steps", lambda *_: pytest.fail("a run was made"))
    compare_objectives.main()
    said = capsys.readouterr().out
    assert said.count("| gspo | 0 | r3 |") == 1
    assert "gspo_0_r3_seed_1: broken after 12 steps: the servers ended" in said
    assert (tmp_path / "compare_objectives.png").stat().st_size > 10_000


def _rows(sentence):
    yield from ROWS
    if sentence:
        raise SamerouteError(sentence)
