"""The table of ranks and servers is in the report, the slowest first, and the straggler in its words."""

from __future__ import annotations

from pathlib import Path

from pipeline.observe.report.run_files import Run
from pipeline.observe.report.slowest import figures


def run_of(*own, servers=None):
    """Five steps of 1 s, whose ranks take so many seconds each in the update."""
    update = {"own": list(own), "waited": [0.5 - s for s in own]}
    sync = {"own": [0.1] * len(own), "waited": [0.0] * len(own)}
    servers = servers or {"0": {"tokens": 100.0, "seconds": 1.0}}
    record = {"ranks": {"update": update, "sync": sync}, "servers": servers}
    metrics = [{"step": step, "time/step_s": 1.0, "time/rollout_s": 0.4} for step in range(1, 6)]
    return Run(Path("run"), {}, metrics, dict.fromkeys(range(1, 6), record))


def test_the_straggler_is_named_and_stands_first():
    (figure,) = figures(run_of(0.2, 0.4, 0.2))
    assert figure.now.startswith("Trainer rank 1 is slow: update takes it 2.0 times")
    table = figure.plot.data[0]
    assert table.header.values == ("who", "update, s", "sync, s", "waited for others, s", "sampling, ms a token")
    assert table.cells.values[0][0] == "trainer rank 1"
    assert table.cells.values[1][0] == "0.400"
    assert table.cells.values[0][-1] == "server 0"
    assert table.cells.values[4][-1] == "10.000"


def test_a_slow_server_is_named():
    servers = {"0": {"tokens": 100.0, "seconds": 1.0}, "1": {"tokens": 100.0, "seconds": 4.0}}
    (figure,) = figures(run_of(0.2, servers=servers))
    assert "Server 1 is slow: sampling takes it 4.0 times" in figure.now


def test_equal_ones_name_nobody_and_one_of_each_has_no_table():
    (figure,) = figures(run_of(0.2, 0.2))
    assert figure.now == "Nobody is slow."
    assert figures(run_of(0.2)) == []


def test_a_run_from_before_these_numbers_has_no_table():
    run = run_of(0.2, 0.2)
    assert figures(Run(run.path, {}, run.metrics, {step: {"step": step} for step in range(1, 6)})) == []
