"""Every family of mixtures of experts through the whole loop, tiny and random: a real server samples, a real trainer
replays its experts, updates and sends the weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.data.tokenizer import VOCAB_SIZE, write_character_tokenizer
from tests.support.command import SMALL
from tests.support.tiny_families import save_family

STEPS = 10
FAMILIES = ["qwen2_moe", "mixtral", "deepseek_v3", "moonlight", "glm4_moe", "glm4_moe_lite", "minimax_m2", "gpt_oss",
            "qwen3_next"]  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_and_trained_and_written(command, tmp_path, family):
    from transformers import AutoModelForCausalLM

    model = save_family(family, tmp_path / "model", vocab_size=VOCAB_SIZE, tie_word_embeddings=False)
    write_character_tokenizer(model)
    run = command(
        *SMALL, f"train.steps={STEPS}", "model.tiny=null", f"model.path={model}",
        "rewards=tests.support.verifiers:length", "train.lr=1e-4", "objective.entropy_coefficient=0.01",
    )  # fmt: skip
    assert run.end(250) == 0, run.text()
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch/max_abs_logprob"] < 1e-4 for row in rows), rows
    assert all(row["mismatch/abs_logprob"] < 1e-5 for row in rows), rows
    assert all(row["routing/replayed_fraction"] == 1.0 for row in rows)
    assert all(row["train/grad_norm"] > 0 for row in rows)
    ids = torch.from_numpy(np.random.default_rng(0).integers(7, VOCAB_SIZE, 20))[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (model, run.run / "hf"))
    assert (before - after).abs().max() > 1e-3
