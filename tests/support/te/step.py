"""One step of a tiny model on one rank, the same code whatever its layers are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_routes
from tests.support.jobs import SAMPLES, joined, keep_gradients, weighted_likelihood, whole_gradients
from tests.support.lora import gathered, stir
from tests.support.tiny_families import LAYERS

ADAPTED = ("qwen2_moe", "deepseek_v3", "gpt_oss")
"""Families whose adapters take a step too: joined matrices, latents and shared experts, experts with biases."""


@dataclass(frozen=True)
class Step:
    """Log-probs of all response tokens, the experts that were chosen and then replayed, the loss, its gradients."""

    logprobs: np.ndarray
    routes: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]


def step(model: str, samples: list) -> Step:
    """Of a Hugging Face directory, in float32, with every activation recomputed."""
    from megatron_ext.trainer import Trainer

    config = TrainerConfig(micro_batch_tokens=100, recompute="full")
    it = Trainer(model, ParallelConfig(), config, OptimizerConfig(), replay=True)
    recorded = it.logprobs(samples, "record" if it.policy.replays else "native")
    if it.policy.replays:
        routes = merge_routes([recorded], SAMPLES, LAYERS, np.dtype(np.uint8))
        samples = [replace(s, routes=r) for s, r in zip(samples, routes, strict=True)]
    else:
        routes = []
    keep_gradients(it.policy)
    update = it.update(samples, weighted_likelihood)
    return Step(joined([recorded], SAMPLES)[0], routes, update.metrics["loss/objective"][0], whole_gradients(it.policy))


def adapted(model: str, samples: list) -> Step:
    """The same of adapters on every projection, whose gradients go by their keys."""
    from megatron_ext.trainer import Trainer

    config, lora = TrainerConfig(micro_batch_tokens=100, recompute="full"), LoraConfig(rank=4, alpha=8.0)
    it = Trainer(model, ParallelConfig(), config, OptimizerConfig(), replay=False, lora=lora)
    stir(it)
    logprobs = joined([it.logprobs(samples, "native")], SAMPLES)[0]
    keep_gradients(it.policy)
    update = it.update(samples, weighted_likelihood)
    return Step(logprobs, [], update.metrics["loss/objective"][0], gathered(it, lambda p: p.main_grad))
