"""A recipe teaches what it is for: the model is better on questions that it was never trained on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.estimates import interval
from tests.support.command import Command


def pass_rates(answers: Path) -> np.ndarray:
    """Of each question, in their order. [questions]"""
    passed = defaultdict(list)
    for line in answers.read_text().splitlines():
        answer = json.loads(line)
        passed[answer["question"]].append(answer["passed"])
    return np.array([np.mean(passed[question]) for question in sorted(passed)])


@pytest.mark.slow
@pytest.mark.proof
def test_a_mixture_of_reasoning_gym_is_learned_and_shows_on_held_out_questions(tmp_path):
    run = Command(tmp_path, "run.overwrite=false", config="configs/recipes/reasoning-gym-tiny.yaml")
    assert run.end(600) == 0, run.text()
    rows = [json.loads(line) for line in (run.run / "evaluations.jsonl").read_text().splitlines()]
    first, last = (row["scores"]["pass@1"] for row in rows)
    assert last[0] > first[0] + 0.08
    # The questions are the same before and after, so each is compared with itself.
    before, after = (pass_rates(file) for file in sorted((run.run / "evaluations" / "spelling").iterdir()))
    assert (before.mean(), after.mean()) == pytest.approx((first[0], last[0]))
    assert interval(after - before)[0] > 0, "the 95% interval of the gain reaches 0"
    trained = [json.loads(line)["reward/mean"] for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert sum(trained[-5:]) > sum(trained[:5])
    assert run.orphans() == []
