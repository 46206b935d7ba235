"""A recipe teaches what it is for: the model is better on questions that it was never trained on."""

from __future__ import annotations

import json

import pytest

from tests.support.command import Command


@pytest.mark.slow
@pytest.mark.proof
def test_a_mixture_of_reasoning_gym_is_learned_and_shows_on_held_out_questions(tmp_path):
    run = Command(tmp_path, "run.overwrite=false", config="configs/recipes/reasoning-gym-tiny.yaml")
    assert run.end(600) == 0, run.text()
    rows = [json.loads(line) for line in (run.run / "evaluations.jsonl").read_text().splitlines()]
    first, last = (row["scores"]["pass@1"] for row in rows)
    assert last[0] > first[0] + 0.08
    assert last[1] > first[2], "the 95% intervals do not even meet"
    trained = [json.loads(line)["reward/mean"] for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert sum(trained[-5:]) > sum(trained[:5])
    assert run.orphans() == []
