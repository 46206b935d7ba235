"""`sameroute train` on a loop without engines: who is told of its steps, and what ends it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.commands.main import main
from pipeline.config import load_config
from pipeline.engine.fleet import Fleet
from pipeline.trainer.spikes import GradientSpikes
from pipeline.waiting import Waiting
from tests.support.episodes import step_result
from tests.support.receivers import free_port
from tests.support.runs import metrics


class Loop:
    """Steps made up here. at_step: called with each before it ends."""

    fleet = Fleet()
    objective = SimpleNamespace(
        composition=SimpleNamespace(ratio="token", surrogate="reinforce", clip_low=None, clip_high=None)
    )
    source = SimpleNamespace(tokenizer=None)
    config, producer, graders, environments = load_config("configs/quickstart.yaml"), None, None, None
    teacher = None
    replay = config.replay.of_model(8)

    def __init__(self, at_step):
        self.at_step, self.on_servers = at_step, None
        self.waiting, self.spikes = Waiting(), GradientSpikes(self.config.train)
        self.trainers = SimpleNamespace(
            where=lambda: [{"rank": 0}], save_hf=lambda directory: None, waiting=Waiting(), progress=lambda: None
        )

    def step(self, number):
        self.at_step(number)
        nothing = np.zeros((0, 4), np.int64)
        return step_result(number, [], [], [], [], [], nothing, metrics(number))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the command; returns its exit code."""
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr("ray.cluster_resources", dict)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_moe"}')

    def run(*overrides, at_step=lambda number: None):
        @contextlib.contextmanager
        def open_loop(*_, **__):
            yield Loop(at_step), tmp_path / "model"

        monkeypatch.setattr("pipeline.loop.run.open_loop", open_loop)
        fixed = [f"run.directory={tmp_path / 'run'}", "run.rollouts_shown=0", "checks.first_rollouts=0"]
        return main(["train", "configs/quickstart.yaml", *fixed, *overrides])

    return run


def test_a_run_serves_its_last_step_and_leaves_its_facts(train, tmp_path, capsys):
    port, seen = free_port(), []

    def scrape(number):
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        seen.append([line for line in text.splitlines() if line.startswith(("sameroute_step ", "sameroute_steps_"))])

    assert train(f"observe.prometheus_port={port}", "train.steps=3", at_step=scrape) == 0
    assert seen[0] == ["sameroute_steps_total 0.0"]
    assert seen[2] == ["sameroute_steps_total 2.0", "sameroute_step 2.0"]
    found = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert found["trainer"] == [{"rank": 0}]
    assert not (tmp_path / "run" / "alerts.jsonl").exists()
    assert "alert" not in capsys.readouterr().out


def test_a_rule_that_stops_ends_the_run_with_1_and_a_sentence(train, tmp_path, capsys):
    rule = "alerts.rules=[{metric: reward/mean, above: 0.25, for_steps: 2, stop: true}]"
    assert train("train.steps=12", rule) == 1
    said = capsys.readouterr()
    assert "sameroute: run, step 2: alert fires: reward/mean above 0.25 for 2 steps." in said.err
    assert "step  2/12" in said.out
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert (event["state"], event["step"], event["stop"]) == ("firing", 2, True)


def test_what_cannot_be_watched_is_refused_and_costs_no_earlier_run(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("of an earlier run")
    assert train("alerts.command=[no-such-program]") == 2
    assert "there is no program 'no-such-program'" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == "of an earlier run"
