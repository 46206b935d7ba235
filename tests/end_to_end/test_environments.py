"""Conversations of many turns teach what single answers could not: the examples, run as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import Command

ROOT = Path(__file__).parents[2]


def data_of(example: str, folder: Path) -> None:
    script = ROOT / "examples" / example / f"{example}.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, cwd=ROOT)


def sources(folder: Path, questions: str) -> str:
    rows = [(questions, "prompts"), ("demonstrations", "supervised")]
    return (
        "data.sources=["
        + ", ".join(f"{{kind: jsonl, path: {folder / name}.jsonl, use: {use}}}" for name, use in rows)
        + "]"
    )


@pytest.mark.slow
@pytest.mark.proof
def test_a_tiny_model_learns_to_call_a_calculator_and_shows_it_on_held_out_products(tmp_path):
    data_of("calculator", tmp_path)
    held_out = f"{{kind: jsonl, path: {tmp_path / 'held_out.jsonl'}}}"
    run = Command(
        tmp_path,
        sources(tmp_path, "questions"),
        f"evaluate=[{{name: held-out, sources: [{held_out}], every_steps: 1000}}]",
        config="examples/calculator/calculator.yaml",
    )
    assert run.end(600) == 0, run.text()
    rows = [json.loads(line) for line in (run.run / "evaluations.jsonl").read_text().splitlines()]
    first, last = (row["scores"]["reward"][0] for row in rows)
    assert first < 0.3
    assert last > 0.8
    steps = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["environment/turns_mean"] > 1.8
    assert max(step["mismatch/max_abs_logprob"] for step in steps) < 1e-4
    assert {step["routing/replayed_fraction"] for step in steps} == {1.0}
    assert run.orphans() == []


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_model_gets_better_at_a_game_of_several_turns_with_credit_by_turns(tmp_path, seed):
    data_of("guess", tmp_path)
    run = Command(tmp_path, sources(tmp_path, "games"), f"run.seed={seed}", config="examples/guess/guess.yaml")
    assert run.end(600) == 0, run.text()
    steps = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    rewards = [step["reward/mean"] for step in steps]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.12
    assert max(step["mismatch/max_abs_logprob"] for step in steps) < 1e-4
    assert run.orphans() == []


@pytest.mark.slow
@pytest.mark.proof
def test_the_agent_that_knows_an_address_takes_a_step_on_both_engines(tmp_path):
    """The game and the calculator take forty, above; all begin in tests/test_examples.py."""
    data_of("calculator", tmp_path)
    small = ["evaluate=[]", "supervised.steps=20", "supervised.decay_steps=null", "train.steps=1"]
    few = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4"]
    run = Command(tmp_path, sources(tmp_path, "questions"), *small, *few, config="examples/agent/agent.yaml")
    assert run.end(120) == 0, run.text()
    (step,) = (json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines())
    assert (step["environment/conversations"], step["environment/failed"]) == (32, 0)
    assert step["endpoint/requests"] >= 32
    assert step["mismatch/max_abs_logprob"] < 1e-4
    assert run.own_orphans() == []
