"""The precision block on both real engines: what each reports to compute with, and that they compute the same."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import ray

from pipeline.config import load_config
from pipeline.controller import mismatch_of
from pipeline.rollout.dump import Dump, read_dump, write_dump
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.session import open_loop
from pipeline.types import Rollout
from scripts.precision_figures import compute_with

SMALL = ["supervised.steps=0", "model.tiny.experts=16", "model.tiny.init_std=0.15", "rollout.max_new_tokens=32",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=8", "checks.probe_every=0"]  # fmt: skip


@contextlib.contextmanager
def session(folder, *overrides):
    (folder / "logs").mkdir()
    config = load_config("configs/quickstart.yaml", [*SMALL, *(f"precision.{o}" for o in overrides)])
    with open_loop(config, folder, folder / "logs") as (loop, _):
        yield loop


def trainer_settings(rank):
    """Runs in a trainer rank."""
    policy = rank.trainer.policy
    config, dtypes = policy.mcore_config, {str(p.dtype) for c in policy.chunks for p in c.parameters()}
    return dtypes, str(config.params_dtype), config.moe_router_dtype, policy.precision


def on_rank(loop, function, *args):
    return ray.get(loop.trainers.ranks[0].__ray_call__.remote(function, *args))


def sample(loop) -> list[Rollout]:
    """64 responses of 32 tokens, loaded."""
    sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
    groups = sample_groups_sync(loop.client, loop.source.take(8), 8, sampling)
    rollouts = [r for g in groups for r in g.rollouts]
    loop.load(rollouts)
    return rollouts


@pytest.mark.slow
def test_a_bfloat16_loop_with_a_float32_head_and_router_agrees_on_both_engines(tmp_path):
    with session(tmp_path, "weights=bfloat16") as loop:
        info = loop.client.server_info()
        assert (info["dtype"], info["enable_fp32_lm_head"], info["kv_cache_dtype"]) == ("bfloat16", True, "auto")
        dtypes, params_dtype, router, precision = on_rank(loop, trainer_settings)
        assert (dtypes, params_dtype, router) == ({"torch.bfloat16"}, "torch.bfloat16", "fp32")
        assert precision.head == "fp32_accumulate"
        assert "router logits of 4 layers in float32" in (tmp_path / "logs" / "sglang.log").read_text()
        for number in (1, 2):
            metrics, _ = loop.step(number)
            assert metrics["mismatch/abs_logprob"] < 0.03
            assert metrics["mismatch/max_abs_logprob"] < 0.4


@pytest.mark.slow
def test_the_kept_tokens_of_every_sample_are_replayed_exactly(tmp_path):
    mask = ["temperature=0.8", "top_k=8", "top_p=0.9", "min_p=0.02"]
    with session(tmp_path, *mask) as loop:
        assert loop.client.server_info()["sampling_mask_max_tokens"] == 72
        rollouts = sample(loop)
        proximal = loop.trainers.logprobs()
        widths = np.concatenate([(r.kept >= 0).sum(1) for r in rollouts])
        assert widths.min() >= 1
        assert widths.max() == 8
        assert 1 < widths.mean() < 8  # top-p and min-p cut too
        assert mismatch_of(rollouts, proximal)["mismatch/max_abs_logprob"] < 1e-4
        alone = [lp[(r.kept >= 0).sum(1) == 1] for lp, r in zip(proximal.logprobs, rollouts, strict=True)]
        assert np.abs(np.concatenate(alone)).max(initial=0.0) == 0.0

        # The whole vocabulary is another distribution, by far.
        loop.load([replace(r, kept=None) for r in rollouts])
        assert mismatch_of(rollouts, loop.trainers.logprobs())["mismatch/abs_logprob"] > 0.1

        for number in (1, 2):
            metrics, groups = loop.step(number)
            assert metrics["mismatch/max_abs_logprob"] < 1e-4
            assert metrics["train/grad_norm"] >= 0
        step = read_dump(write_dump(tmp_path, Dump(2, loop.version, 0.8, tuple(groups))))
        for before, after in zip(groups, step.groups, strict=True):
            for one, other in zip(before.rollouts, after.rollouts, strict=True):
                assert np.array_equal(one.kept, other.kept)


@pytest.mark.slow
def test_a_narrower_cache_is_rounded_in_the_trainer_too(tmp_path):
    with session(tmp_path, "kv_cache=bfloat16") as loop:
        assert loop.client.server_info()["kv_cache_dtype"] == "bfloat16"
        rollouts = sample(loop)
        both = mismatch_of(rollouts, loop.trainers.logprobs())["mismatch/abs_logprob"]
        on_rank(loop, compute_with, loop.config.precision.model_copy(update={"kv_cache": "same"}))
        one_sided = mismatch_of(rollouts, loop.trainers.logprobs())["mismatch/abs_logprob"]
        assert both < 3e-4
        assert one_sided > 10 * both
