"""Answers to one prompt, through a prefix cache, have the routes by which each of their tokens was sampled."""

from __future__ import annotations

import asyncio
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.config.server import ServerConfig
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.trainer.group import to_sample
from tests.conftest import client_of
from tests.support.ranks import run_ranks
from tests.support.sampling import answers

SAMPLES = 8


@pytest.fixture(scope="module")
def undecided(tiny_model_dir, tmp_path_factory):
    """The tiny model, among whose experts rounding decides: of two triples of routers the rows are nearly equal."""
    folder = tmp_path_factory.mktemp("undecided") / "model"
    shutil.copytree(tiny_model_dir, folder)
    draw = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if name.endswith("mlp.gate.weight"):
                for first in (0, 3):
                    for row in (first + 1, first + 2):
                        weight[row] = weight[first] * (1 + 2e-7 * torch.randn(weight[first].shape, generator=draw))
        save_file(tensors, file, {"format": "pt"})
    return folder


def _replayed(config, model, samples):
    """Runs on a rank: log-probs of the answers, by their routes."""
    from megatron_ext.trainer import Trainer

    trainer = Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=True)
    rows = trainer.logprobs(samples, "replay").quantities[0]
    return [rows[i] for i in range(len(samples))]


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("overlap", [False, True])
def test_every_token_of_answers_to_one_prompt_is_replayed_as_it_was_sampled(undecided, tmp_path, overlap):
    config = ServerConfig(context_length=512, max_total_tokens=8192, prefix_cache=True, overlap_schedule=overlap)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 60, length) for length in (3, 4, 5, 6, 7, 8, 9, 10, 11, 40)]
    later = [np.concatenate([prompt, draw.integers(3, 60, 5)]) for prompt in prompts]  # as another turn does

    async def all_at_once(client, prompts):
        sampling = Sampling(8, 1.0, ignore_eos=True)
        groups = await asyncio.gather(*(answers(client, prompt, SAMPLES, sampling) for prompt in prompts))
        return [rollout for group in groups for rollout in group]

    with SGLangServer(config, undecided, tmp_path / "log", device="cpu", seed=0, return_routed_experts=True) as it:
        client = client_of(it, timeout_s=60)
        asked = (*([prompt] for prompt in prompts), prompts, later)
        groups = [asyncio.run(all_at_once(client, at_once)) for at_once in asked]
    rollouts = [rollout for group in groups for rollout in group]
    (expected,) = run_ranks(_replayed, ParallelConfig(), str(undecided), [to_sample(r) for r in rollouts])
    gaps = [np.abs(row - rollout.rollout_logprobs).max() for row, rollout in zip(expected, rollouts, strict=True)]
    assert max(gaps) < 1e-5
    routes = [{rollout.routes[: len(rollout.prompt_ids)].tobytes() for rollout in group} for group in groups[:-2]]
    assert max(map(len, routes)) > 1, "no expert was decided by rounding, so that nothing was shown"
