"""When a run evaluates, what it makes up for after a resumption, and which checkpoint is its best."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import load_config
from pipeline.evaluation.answering import GivenUp
from pipeline.evaluation.best import Best
from pipeline.evaluation.result import Evaluation, Score
from pipeline.loop import evaluations as module
from pipeline.loop.evaluations import Evaluations
from pipeline.loop.run import _Run

SETS = "evaluate=[{name: a, prompts: 1, every_steps: 2}, {name: b, prompts: 1, every_steps: 3, at_start: false}]"
CHECKPOINTS = "checkpoint={every_steps: 1, best: {score: eval/a/pass@1, patience: 2}}"


class Records:
    def __init__(self):
        self.rows = []

    def record_evaluation(self, row, answers):
        self.rows.append((row["set"], row["step"], row.get("skipped")))


@pytest.fixture
def make(monkeypatch):
    """Evaluations whose scores are made up: of a set and a step. stops: (set, step) during which a signal comes."""

    def build(scores=lambda name, step: 0.5, stops=(), records=None, state=None):
        config = load_config("configs/quickstart.yaml", [SETS, CHECKPOINTS])
        sets = [
            SimpleNamespace(
                name=one.name,
                due=lambda step, last, one=one: (
                    one.at_start if step == 0 else step % one.every_steps == 0 or step == last
                ),
            )
            for one in config.evaluate
        ]
        signal = []

        def evaluate_set(asked, servers, config, *, step, give_up, **_):
            if (asked.name, step) in stops:
                signal.append("SIGTERM")
                raise GivenUp(give_up())
            value = scores(asked.name, step)
            return Evaluation(asked.name, step, step, 1.0, 1, {"pass@1": Score(value, value, value, 1)},
                              {"length_mean": 1.0, "truncated_fraction": 0.0, "failed": 0.0}, [])  # fmt: skip

        monkeypatch.setattr(module, "evaluate_set", evaluate_set)
        made = Evaluations(
            config, sets, None, None, 7, records or Records(), lambda line: None, lambda: signal[0] if signal else None
        )
        if state is not None:
            made.restore(state)
        return made

    return build


def test_each_set_is_evaluated_when_it_is_due_once_and_at_the_end(make):
    evaluations = make()
    metrics = [evaluations.after(step) for step in range(8)]
    assert [(name, step) for name, step, _ in evaluations.records.rows] == [
        ("a", 0), ("a", 2), ("b", 3), ("a", 4), ("a", 6), ("b", 6), ("a", 7), ("b", 7),
    ]  # fmt: skip
    assert "eval/a/pass@1" in metrics[2]
    assert metrics[1] == {}
    assert evaluations.after(7) == {}, "it was evaluated"


def test_what_a_signal_interrupts_is_left_out_with_its_reason_and_made_up_for_when_the_run_goes_on(make):
    records = Records()
    stopped = make(stops=[("a", 6)], records=records)
    for step in range(7):
        stopped.after(step)
    assert records.rows[-2:] == [("a", 6, "SIGTERM"), ("b", 6, "SIGTERM")]
    resumed = make(records=records, state=stopped.state())
    assert set(resumed.after(6)) >= {"eval/a/pass@1", "eval/b/pass@1"}
    assert records.rows[-2:] == [("a", 6, None), ("b", 6, None)]
    assert make(records=records, state=resumed.state()).after(6) == {}, "it has been by now"


def test_a_run_resumed_with_another_set_evaluates_that_where_it_is_due(make):
    assert set(make(state={"done": {"a": 6}, "best": None}).after(6)) >= {"eval/b/pass@1"}


def test_the_best_is_the_highest_and_the_run_ends_when_none_is_better_for_long_enough(make):
    values = {0: 0.2, 2: 0.5, 4: 0.5, 6: 0.4, 7: 0.9}
    evaluations, better = make(lambda name, step: values.get(step, 0)), []
    for step in range(7):
        if evaluations.better(step, evaluations.after(step)):
            better.append(step)
        assert evaluations.exhausted == (step == 6)
    assert better == [0, 2]
    again = make(state=evaluations.state())
    assert again.exhausted
    assert (again.best.value, again.best.step, again.best.since) == (0.5, 2, 2)


def test_patience_begins_anew_with_each_that_is_better():
    best = Best(load_config("configs/quickstart.yaml", [SETS, CHECKPOINTS]).checkpoint.best)
    for step, value in enumerate((0.2, 0.1, 0.5, 0.4)):
        best.better(step, {"eval/a/pass@1": value})
    assert (best.step, best.since, best.exhausted) == (2, 1, False)
    assert not best.better(4, {"eval/b/pass@1": 0.9}), "another set was evaluated"
    assert best.since == 1


def test_another_score_has_another_best():
    config = load_config("configs/quickstart.yaml", [SETS, CHECKPOINTS]).checkpoint.best
    state = Best(config, 0.9, 4, 1).state()
    assert Best.restored(config, state) == Best(config, 0.9, 4, 1)
    other = config.model_copy(update={"score": "eval/b/pass@1"})
    assert Best.restored(other, state) == Best(other)
    assert replace(Best(config), since=5).exhausted


@pytest.mark.parametrize(("step", "linked"), [(6, True), (0, False)])
def test_a_checkpoint_that_is_found_best_after_a_resumption_is_kept_and_exported(step, linked, monkeypatch, tmp_path):
    """Its evaluation was interrupted, so it was saved without being called best."""
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.directory / f"step_{step}"
    path.mkdir(parents=True)
    made, exported, told = SimpleNamespace(after=lambda done: {"eval/a/pass@1": 0.9}), [], []
    made.restore, made.better = lambda state: None, lambda done, metrics: True
    monkeypatch.setattr("pipeline.loop.run.Evaluations", lambda *_, **__: made)
    run = _Run(load_config("configs/quickstart.yaml"), store, None, SimpleNamespace(say=None), None, 9, 0)
    run._export = exported.append
    start = SimpleNamespace(path=path, progress=SimpleNamespace(step=step, evaluations={}))
    loop = SimpleNamespace(fleet=None, on_servers=None, trainers="trainers", graders=None, environments=None)
    run._evaluations(loop, (), start, SimpleNamespace(record_beginning=lambda *row: told.append(row)))
    assert told == [(step, {"eval/a/pass@1": 0.9})]
    assert store.best == (path.resolve() if linked else None)
    assert exported == (["trainers"] if linked else [])
