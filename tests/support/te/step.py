"""One step of a tiny model on one rank, the same code whatever its layers are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_routes
from tests.support.jobs import SAMPLES, joined, keep_gradients, weighted_likelihood, whole_gradients
from tests.support.tiny_families import LAYERS


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
