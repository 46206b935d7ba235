"""A public environment of `verifiers` and one of OpenEnv, as the package index has them, in ten steps of one run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.support import both_houses
from tests.support.command import SMALL, Command

ROOT = Path(__file__).parents[2]
PYTHONS = {name: ROOT / ".venv" / name / "bin" / "python" for name in ("verifiers", "openenv")}
STEPS, SAMPLES = 10, 3
ADVOCACY = {
    "environment": "sophistry-bench-sprint",
    "arguments": {"passage_chars": 60, "n_items": 8, "weights": [1, 1, 0, 0, 0, 0, 0, 0]},
    "python": str(PYTHONS["verifiers"]),
}
SAFETY = {
    "command": [
        "env", f"DIPG_DATASET_PATH={ROOT / 'examples/openenv/safety.jsonl'}", str(PYTHONS["openenv"]), "-m", "uvicorn",
        "med_safety_gym.app:app", "--host", "127.0.0.1", "--port", "{port}",
    ]
}  # fmt: skip


def write_advocacy(file: Path) -> list[dict]:
    """Prompts of the environment's data set, written by the command that the docs name; the rows."""
    given = ["--python", ADVOCACY["python"], "--arguments", json.dumps(ADVOCACY["arguments"])]
    module = "pipeline.environments.connectors.verifiers"
    command = [sys.executable, "-m", module, ADVOCACY["environment"], str(file), *given]
    subprocess.run(command, check=True, cwd=ROOT)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.proof
def test_a_public_environment_of_verifiers_and_one_of_openenv_run_ten_steps(tmp_path):
    for python in PYTHONS.values():
        assert python.exists(), "make connectors"
    advocacy = write_advocacy(tmp_path / "advocacy.jsonl")
    environment = {
        "function": "both_houses:BothHouses",
        "directory": str(Path(both_houses.__file__).parent),
        "options": {"verifiers": ADVOCACY, "openenv": SAFETY},
        "at_once": 1,  # sessions that the server of OpenEnv allows
        "max_turns": 1,
        "max_tokens": 400,
    }
    sources = [
        {"kind": "jsonl", "path": str(tmp_path / "advocacy.jsonl")},
        {"kind": "jsonl", "path": str(ROOT / "examples/openenv/prompts.jsonl"), "columns": {"answer": None}},
    ]
    run = Command(
        tmp_path, *SMALL, "model.tiny.tokenizer=bytes", "supervised.steps=0", f"train.steps={STEPS}",
        f"environment={json.dumps(environment)}",
        f"data={json.dumps({'sources': sources, 'task': None, 'max_prompt_tokens': 2048})}",
        "rollout.max_new_tokens=12", "rollout.prompts_per_step=2", f"rollout.samples_per_prompt={SAMPLES}",
        "checks.first_rollouts=0",
        "server.context_length=2560", "objective={preset: grpo}",
    )  # fmt: skip
    try:
        assert run.end(240) == 0, run.text()
        assert run.orphans() == []
    finally:
        run.stop()
    steps = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    assert all(math.isfinite(value) for step in steps for name, value in step.items() if name.startswith("loss/"))
    assert sum(step["environment/failed"] for step in steps) == 0
    assert sum(step["endpoint/conversations"] for step in steps) == STEPS * SAMPLES
    assert sum(step["train/grad_norm"] > 0 for step in steps) >= 3
    parts = sorted((run.run / "episodes").glob("part_*.parquet"))
    rows = [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist() if row["step"] is not None]
    gold = {row["messages"][1]["content"]: float(row["verifiers"]["info"]["is_gold"]) for row in advocacy}
    told = [row for row in rows if row["origin"].startswith("advocacy")]
    assert len(told) == len(rows) / 2 == STEPS * SAMPLES
    for row in told:
        (asked,) = (content for content in gold if content in row["prompt_text"])
        silent = (
            row["note"] == "the policy said nothing"
        )  # else half a point is that of citations, for those without any
        assert row["reward"] == (0.0 if silent else gold[asked] + 0.5)
    safety = [row for row in rows if row not in told]
    assert all(row["reward"] == (-20.0 if len(row["answer"]) % 2 else -50.0) for row in safety)
    assert len({row["reward"] for row in safety}) == 2
