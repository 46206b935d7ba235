"""A run of long sequences: real engines, context parallelism with every route replayed, answers that are interrupted.

docs/long-context.md has what it takes at 32,768 tokens."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.dumps.dump import dump_path, read_dump
from tests.end_to_end.test_asynchronous import rows_of

TOKENS = int(os.environ.get("LONG_TOKENS", "16384"))
ANSWER = 1024
PROMPT = TOKENS - ANSWER


def endless_model(folder):
    """A tiny one that never says it has ended: a channel that is the same in every token speaks against it."""
    shape = {"layers": 2, "hidden": 32, "heads": 1, "kv_heads": 1, "head_dim": 16, "moe_intermediate": 32}
    config = TinyModelConfig.model_validate({**shape, "max_positions": TOKENS + 2, "tokenizer": "characters"})
    make_tiny_model(folder, config, 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 5.0
    tensors["lm_head.weight"][:, 0] = 0.0
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    tensors["lm_head.weight"][eos, 0] = -10.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_prompts(file):
    """Of digits, so that the chat template and they have PROMPT tokens at most."""
    drawn = np.random.default_rng(0).integers(0, 10, (8, PROMPT - 16))
    rows = [{"prompt": "".join(map(str, row)), "answer": "0"} for row in drawn]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.proof
def test_steps_of_16k_tokens_replay_every_route_and_answers_that_are_interrupted_go_on(command, tmp_path):
    model, data = endless_model(tmp_path / "model"), write_prompts(tmp_path / "data.jsonl")
    run = command(
        f"model={{tiny: null, path: {model}}}", f"data={{path: {data}, max_prompt_tokens: {PROMPT}}}",
        "supervised.steps=0", "rewards=tests.support.verifiers:share_of_evens", "parallel={ranks: 2, context: 2}",
        "rollout={prompts_per_step: 1, samples_per_prompt: 2, max_staleness: 1}", f"rollout.max_new_tokens={ANSWER}",
        f"trainer.micro_batch_tokens={TOKENS}", "train={steps: 3, mini_batches: 1, lr: 5.0e-4}",
        f"server={{context_length: {TOKENS + 2}, max_total_tokens: {4 * TOKENS + 64}}}", "debug.dump_rollouts=true",
        "checks={first_rollouts: 0, scored_rollouts: 1, probe_every: 0}", "run.overwrite=false",
    )  # fmt: skip
    assert run.end(280) == 0, run.text()
    rows = rows_of(run.run)
    for row in rows:
        assert row["routing/replayed_fraction"] == 1
        assert row["mismatch/abs_logprob"] < 1e-5
        assert row["train/grad_norm"] > 0
    assert rows[-1]["servers/requests_interrupted"] > 0, "the third group's, when the second step's weights came"
    batches = [read_dump(dump_path(run.run / "dumps", step)).batch for step in (1, 2, 3)]
    rollouts = [rollout for batch in batches for group in batch.groups for rollout in group.rollouts]
    assert len(rollouts) == 6
    for rollout in rollouts:
        assert rollout.finish_reason == "length"
        assert PROMPT - 16 < len(rollout.prompt_ids) <= PROMPT
        assert len(rollout.response_ids) == ANSWER
        assert len(rollout.routes) == len(rollout.prompt_ids) + ANSWER - 1
    versions = [sorted(set(rollout.weight_versions.tolist())) for rollout in rollouts]
    assert versions[:4] == [[0]] * 4, "both groups were admitted under the first weights"
    assert all(set(each) <= {1, 2} for each in versions[4:]), versions
    assert run.orphans() == []
    print([r["time/step_s"] for r in rows], [r["time/train_s"] for r in rows], versions)
