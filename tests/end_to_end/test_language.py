"""SmolLM2, a real language model, upcycled to a mixture of experts, through the whole loop: `make language`, short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import Command

ROOT = Path(__file__).parents[2]
PRESET = "configs/smollm2-moe/arithmetic.yaml"
SHORT = ["train.steps=1", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "checks.first_rollouts=2",
         "evaluate=[]", "train.warmup_steps=0",
         "server.cpu_threads=1"]  # fmt: skip  # as the process has it that forks the servers of all tests


@pytest.mark.slow
@pytest.mark.proof
def test_the_upcycled_model_answers_in_words_and_both_engines_agree_on_every_token(tmp_path):
    model = ROOT / "models" / "SmolLM2-MoE-4x135M"
    assert (model / "config.json").exists(), "make language-model"
    run = Command(tmp_path, *SHORT, f"model.path={model}", config=PRESET)
    try:
        assert run.end(300) == 0, run.text()
    finally:
        run.stop()
    (row,) = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert row["mismatch/max_abs_logprob"] < 1e-4, row
    assert row["routing/replayed_fraction"] == 1.0
    assert 1 <= row["response/length_mean"] <= 16
    phases = (run.run / "logs" / "start.log").read_text()
    for phase in ("the trainer loads the model", "the weights of both engines are compared by name", "is written"):
        assert f"{phase}: done after" in phases
    hf = json.loads((run.run / "hf" / "config.json").read_text())
    assert (hf["model_type"], hf["vocab_size"], hf["num_local_experts"]) == ("mixtral", 49152, 4)
