"""Models without experts through the whole loop: Llama, tied and with a stretched rotary embedding, and Qwen2."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.data.tokenizer import VOCAB_SIZE, write_character_tokenizer
from tests.support.command import SMALL
from tests.support.proofs import sampled
from tests.support.tiny_families import save_family

STEPS = 3


@pytest.mark.slow
@pytest.mark.parametrize("family", sampled(["llama", "qwen2"], ["llama"]))
def test_a_dense_model_is_served_and_trained_and_written(command, tmp_path, family):
    from transformers import AutoModelForCausalLM

    model = save_family(family, tmp_path / "model", vocab_size=VOCAB_SIZE)
    write_character_tokenizer(model)
    run = command(
        *SMALL, f"train.steps={STEPS}", "model.tiny=null", f"model.path={model}", "parallel={ranks: 2, tensor: 2}",
        "rewards=tests.support.verifiers:length",
    )  # fmt: skip
    assert run.end(200) == 0, run.text()
    assert "replay=r3 replays nothing: the model has no experts, so there are no routes" in run.text()
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch/max_abs_logprob"] < 1e-4 for row in rows), rows
    assert any(row["train/grad_norm"] > 0 for row in rows)
    assert not any(key.startswith("routing/") for row in rows for key in row)
    ids = torch.from_numpy(np.random.default_rng(0).integers(7, VOCAB_SIZE, 20))[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (model, run.run / "hf"))
    assert (before - after).abs().max() > 1e-3
