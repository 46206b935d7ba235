"""One step of a tiny model, the same code whatever its layers are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_routes, merge_update
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
    """Of a Hugging Face directory, in float32, with every activation recomputed; on one rank."""
    return whole([part(ParallelConfig(), model, samples)])


def part(config: ParallelConfig, model: str, samples: list, routes: list[np.ndarray] | None = None) -> tuple:
    """Of a rank: log-probs and routes, the update, and on rank 0 the gradients. routes: to be replayed; None: what the
    routers of this only rank chose."""
    from megatron_ext.trainer import Trainer

    settings = TrainerConfig(micro_batch_tokens=100, recompute="full")
    it = Trainer(model, config, settings, OptimizerConfig(), replay=True)
    recorded = it.logprobs(samples, "record" if it.policy.replays else "native")
    if it.policy.replays:
        routes = _routes([recorded]) if routes is None else routes
        samples = [replace(s, routes=r) for s, r in zip(samples, routes, strict=True)]
    keep_gradients(it.policy)
    update = it.update(samples, weighted_likelihood)
    return recorded, update, whole_gradients(it.policy)


def whole(parts: list[tuple]) -> Step:
    """Of all ranks' parts."""
    recorded = [each[0] for each in parts]
    routes = _routes(recorded) if any(each.routes for each in recorded) else []
    loss = merge_update([each[1] for each in parts])["loss/objective"]
    return Step(joined(recorded, SAMPLES)[0], routes, loss, parts[0][2])


def _routes(recorded: list) -> list[np.ndarray]:
    return merge_routes(recorded, SAMPLES, LAYERS, np.dtype(np.uint8))


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
