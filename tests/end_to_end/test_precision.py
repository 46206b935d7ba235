"""The precision block on both real engines: what each reports to compute with, and that they compute the same."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import ray

from pipeline.config import load_config
from pipeline.diagnose import diagnose
from pipeline.dumps.dump import Dump, read_dump, write_dump
from pipeline.loop.compare import replay_probe
from pipeline.loop.open_loop import open_loop
from pipeline.observe.metrics import mismatch_of
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.types import Rollout
from scripts.precision_figures import compute_with

SMALL = ["supervised.steps=0", "model.tiny.experts=16", "model.tiny.init_std=0.15", "rollout.max_new_tokens=32",
         "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "checks.probe_every=0",
         "checks.probe_rollouts=128"]  # fmt: skip
LONGER = ["rollout.max_new_tokens=48", "server.context_length=66"]


@contextlib.contextmanager
def session(folder, *overrides):
    (folder / "logs").mkdir()
    config = load_config("configs/quickstart.yaml", [*SMALL, *overrides])
    with open_loop(config, folder, folder / "logs") as opened:
        yield opened


def trainer_settings(rank):
    """Runs in a trainer rank."""
    policy = rank.trainer.policy
    config, dtypes = policy.mcore_config, {str(p.dtype) for c in policy.chunks for p in c.parameters()}
    return dtypes, str(config.params_dtype), config.moe_router_dtype, policy.precision.head


def round_to_int8(rank):
    """Runs in a trainer rank."""
    rank.rollout_weights = "int8"


def on_rank(loop, function, *args):
    return ray.get(loop.trainers.ranks[0].__ray_call__.remote(function, *args))


def sample(loop) -> list[Rollout]:
    """32 responses of 32 tokens, loaded."""
    sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
    groups = sample_groups_sync(loop.fleet, loop.source.take(8), 4, sampling)
    rollouts = [r for g in groups for r in g.rollouts]
    loop.load(rollouts)
    return rollouts


def gap(loop, rollouts) -> float:
    """Mean |log pi_o - log mu|, nats, with routes replayed."""
    return mismatch_of(rollouts, loop.trainers.logprobs())["mismatch/abs_logprob"]


def replay_reduces_the_mismatch_twofold_and_large_ratios_tenfold(loop) -> None:
    """What replay is for: the trainer's mismatch with and without the server's routes."""
    sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
    groups = sample_groups_sync(loop.fleet, loop.source.take(32), 4, sampling)
    rollouts = [r for g in groups for r in g.rollouts]
    loop.load(rollouts)
    found = replay_probe(loop.trainers, rollouts)
    assert sum(len(r) for r in rollouts) == 128 * 48
    assert found["probe/k3_native"] > 2 * found["probe/k3_replay"]
    assert found["probe/f2_native"] > 1e-3
    assert found["probe/f2_native"] >= 10 * found["probe/f2_replay"]


@pytest.mark.slow
def test_a_bfloat16_loop_with_a_float32_head_and_router_agrees_on_both_engines_where_routes_are_replayed(tmp_path):
    with session(tmp_path, "precision.weights=bfloat16", *LONGER) as (loop, _):
        info = loop.fleet.servers[0].client.server_info()
        assert (info["dtype"], info["enable_fp32_lm_head"], info["kv_cache_dtype"]) == ("bfloat16", True, "auto")
        assert "router logits of 4 layers in float32" in (tmp_path / "logs" / "sglang.log").read_text()
        assert on_rank(loop, trainer_settings) == ({"torch.bfloat16"}, "torch.bfloat16", "fp32", "fp32_accumulate")
        replay_reduces_the_mismatch_twofold_and_large_ratios_tenfold(loop)
        for number in (1, 2):
            metrics = loop.step(number).metrics
            assert metrics["mismatch/abs_logprob"] < 0.03
            assert metrics["mismatch/max_abs_logprob"] < 0.4


@pytest.mark.slow
def test_kept_tokens_a_narrow_cache_and_rounded_weights_are_the_same_on_both_engines(tmp_path):
    precision = ["temperature=0.8", "top_k=8", "top_p=0.9", "min_p=0.02", "kv_cache=bfloat16"]
    with session(tmp_path, *(f"precision.{setting}" for setting in precision)) as (loop, model):
        info = loop.fleet.servers[0].client.server_info()
        assert (info["sampling_mask_max_tokens"], info["kv_cache_dtype"]) == (72, "bfloat16")
        rollouts = sample(loop)
        widths = np.concatenate([(r.kept >= 0).sum(1) for r in rollouts])
        assert widths.max() == 8
        assert widths.min() < 8  # top-p and min-p cut too
        alike = gap(loop, rollouts)
        assert alike < 3e-4  # a few roundings of the cache fall on the other side
        assert diagnose(loop, model, rollouts).agree

        loop.load([replace(r, kept=None) for r in rollouts])
        assert gap(loop, rollouts) > 0.1  # the whole vocabulary is another distribution

        for number in (1, 2):
            result = loop.step(number)
            assert result.metrics["mismatch/abs_logprob"] < 3e-4
        step = read_dump(write_dump(tmp_path, Dump(result.batch, 0.8)))
        for one, other in zip(result.batch.rollouts, step.batch.rollouts, strict=True):
            assert np.array_equal(one.kept, other.kept)

        rollouts = sample(loop)
        on_rank(loop, compute_with, loop.config.precision.model_copy(update={"kv_cache": "same"}))
        assert gap(loop, rollouts) > 10 * alike

        on_rank(loop, round_to_int8)
        assert loop.trainers.weight_differences()
        loop.sync()
        assert loop.trainers.weight_differences() == []
        assert (
            3e-3
            < gap(loop, sample(loop))
            < loop.config.model_copy(
                update={"precision": loop.config.precision.model_copy(update={"rollout_weights": "int8"})}
            ).logprob_bound
        )
