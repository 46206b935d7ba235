"""Every family of mixtures of experts through the whole loop, tiny and random: a real server samples, a real trainer
replays its experts, updates and sends the weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.tokenizer import VOCAB_SIZE, write_character_tokenizer
from tests.support.command import SMALL
from tests.support.tiny_families import save_family

STEPS = 10
FAMILIES = ["qwen2_moe", "mixtral", "deepseek_v3", "moonlight", "glm4_moe", "glm4_moe_lite", "minimax_m2", "gpt_oss",
            "qwen3_next", "qwen3_5_moe"]  # fmt: skip


@pytest.mark.proof
def test_a_family_that_no_server_has_on_a_cpu_takes_supervised_steps_and_its_indexers_stay_as_they_were(
    command, tmp_path
):
    model = save_family("deepseek_v32", tmp_path / "model", vocab_size=VOCAB_SIZE, index_topk=64)
    write_character_tokenizer(model)
    run = command(
        *SMALL, "train.steps=0", "supervised.steps=3", "supervised.lr=1e-3", "model.tiny=null", f"model.path={model}"
    )
    assert run.end(100) == 0, run.text()
    before, after = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (model, run.run / "hf")
    )
    assert before.keys() == after.keys()
    still = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    assert {name for name in still if ".indexer." in name} == {name for name in before if ".indexer." in name} != set()
    assert all(".indexer." in name or name.endswith("e_score_correction_bias") for name in still)


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
