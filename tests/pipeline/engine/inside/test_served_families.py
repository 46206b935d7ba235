"""SGLang on the CPU computes every family as transformers does: what it samples, and long prompts."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample
from megatron_ext.hf.description import read_description
from pipeline.config.server import ServerConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from tests.support.sampling import answers
from tests.support.tiny_families import VOCAB, save_family, transformers_says

SERVED = ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "moonlight", "glm4_moe", "glm4_moe_lite", "minimax_m2",
          "gpt_oss", "qwen3_next", "qwen3_5_moe"]  # fmt: skip
PROMPTS = (4, 30, 200)  # the last is long enough for torch's kernel; the window of gpt-oss is 5


async def said(client, prompts):
    """An answer to each prompt, and what the server says of the last with its answer when it only scores it."""
    rollouts = [(await answers(client, prompt, 1, Sampling(40, 1.0, ignore_eos=True)))[0] for prompt in prompts]
    async with client:
        return rollouts, await client.score(np.concatenate([rollouts[-1].prompt_ids, rollouts[-1].response_ids]))


@pytest.mark.proof
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("family", SERVED)
def test_a_server_says_what_transformers_says(family, tmp_path):
    name, changes = ("qwen3_moe with dense layers", {"mlp_only_layers": []}) if family == "qwen3_moe" else (family, {})
    folder = save_family(name, tmp_path / "model", tie_word_embeddings=False, **changes)
    model = read_description(folder)
    config = ServerConfig(context_length=512, max_total_tokens=4096, prefix_cache=True)
    draw = np.random.default_rng(0)
    with SGLangServer(config, folder, tmp_path / "log", device="cpu", seed=0, return_routed_experts=True) as server:
        client = SGLangClient(
            server.url, vocab_size=VOCAB, num_layers=model.num_layers, topk=model.topk, num_experts=model.num_experts,
            moe_layers=model.moe_layers, keys=server.keys, log_path=server.log_path,
        )  # fmt: skip
        prompts = [draw.integers(2, VOCAB - 1, length) for length in PROMPTS]
        rollouts, (scored, scored_routes) = asyncio.run(said(client, prompts))
    samples = [Sample(np.concatenate([r.prompt_ids, r.response_ids]), len(r.prompt_ids)) for r in rollouts]
    expected, routes = transformers_says(folder, samples)
    assert np.abs(np.concatenate([r.rollout_logprobs for r in rollouts]) - expected).max() < 2e-5
    assert np.abs(scored[PROMPTS[-1] - 1 :] - rollouts[-1].rollout_logprobs).max() < 2e-5
    for rollout, theirs in zip(rollouts, routes, strict=True):
        same = (np.sort(rollout.routes, -1) == np.sort(theirs, -1)).all(-1)
        assert same[:, list(model.moe_layers)].mean() > 0.995
    assert (scored_routes == rollouts[-1].routes).mean() > 0.995
