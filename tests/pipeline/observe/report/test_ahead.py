"""The report's section of rollouts that are made beside the training is there for such runs, and only there."""

from __future__ import annotations

from pipeline.observe.console import step_line
from pipeline.observe.report.page import sections
from pipeline.observe.report.run_files import read_run
from tests.support.runs import MadeRun, metrics

TITLE = "How far do rollouts run ahead?"
AHEAD = {
    "rollout/lag_mean": 1.5, "rollout/lag_max": 2.0, "rollout/lag_1": 0.5, "rollout/lag_2": 0.5, "idle/trainer": 0.1,
    "idle/servers": 0.25, "rollout/open_length_mean": 9.0, "staleness/k3_lag_1": 1e-3, "staleness/k3_lag_2": 4e-3,
}  # fmt: skip


def section_of(folder, **changes):
    run = MadeRun(folder)
    for step in (1, 2, 3):
        run.write(step, **changes)
    return dict(sections(read_run(run.path))).get(TITLE)


def test_a_run_in_turn_has_no_such_section(tmp_path):
    assert section_of(tmp_path) is None


def test_lag_idleness_and_lengths_are_shown_and_staleness_apart_by_lag(tmp_path):
    figures = {figure.name: figure for figure in section_of(tmp_path, **AHEAD)}
    assert list(figures) == ["lag", "staleness", "idle", "open_lengths"]
    assert [trace.name for trace in figures["staleness"].plot.data] == ["1 versions behind", "2 versions behind"]
    assert "1.50 versions on average" in figures["lag"].now
    assert all(figure.plot is not None and not figure.missing for figure in figures.values())


def test_a_line_says_how_old_the_tokens_are_and_who_waited():
    waited = {"time/wait_s": 0.2, "time/pause_s": 0.1}
    line = step_line(metrics(3) | AHEAD | waited, 12)
    assert "lag 1.5  idle trainer 10%  idle servers 25%" in line
    assert "wait 0.20, train 0.50, pause 0.10, sync 0.05" in line
    assert "lag" not in step_line(metrics(3), 12)
