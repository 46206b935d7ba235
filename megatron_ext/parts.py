"""What one rank answers, and how the answers of all ranks become one. Neither torch nor Megatron is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Metrics = dict[str, tuple[float, float]]
"""name -> (sum, weight). Sums and weights add up over micro-batches and ranks; a weight of zero leaves a sum."""


@dataclass(frozen=True)
class LogprobPart:
    """One rank's answer to `Trainer.logprobs`. Empty on ranks that do not speak for their replica.

    logprobs: sample index -> [N] float32.  entropy: likewise.
    routing:  layer -> (tokens replayed, of these native selection agreed, tokens fallen back).
    tokens:   input tokens that this rank's replica processed.
    """

    logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    entropy: dict[int, np.ndarray] = field(default_factory=dict)
    routing: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class UpdatePart:
    """One rank's answer to `Trainer.update`. grad_norm, lr and skipped are equal on all ranks."""

    metrics: Metrics
    grad_norm: float
    lr: float
    skipped: bool


def merge_logprobs(parts: Sequence[LogprobPart], count: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Join the parts of all ranks.

    count: how many samples were asked for. Returns log-probs and entropies in the order of the samples, and routing
    [layers, 3] int64 (tokens replayed, native selection agreed, fallen back), layers without a router zero.
    Raises RuntimeError where a sample has no answer.
    """
    logprobs: dict[int, np.ndarray] = {}
    entropy: dict[int, np.ndarray] = {}
    layers = 1 + max((layer for p in parts for layer in p.routing), default=-1)
    routing = np.zeros((layers, 3), np.int64)
    for part in parts:
        logprobs |= part.logprobs
        entropy |= part.entropy
        for layer, counts in part.routing.items():
            routing[layer] += counts
    absent = [i for i in range(count) if i not in logprobs]
    if absent:
        raise RuntimeError(f"no rank answered for samples {absent[:10]}")
    return [logprobs[i] for i in range(count)], [entropy[i] for i in range(count)], routing


def merge_update(parts: Sequence[UpdatePart]) -> dict[str, float]:
    """Join the parts of all ranks into metrics: a name with a weight becomes a mean, one without stays a sum."""
    sums: Metrics = {}
    for part in parts:
        for name, (total, weight) in part.metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + weight)
    out = {name: total / weight if weight else total for name, (total, weight) in sums.items()}
    return out | {
        "train/grad_norm": parts[0].grad_norm,
        "train/lr": parts[0].lr,
        "train/skipped_updates": float(parts[0].skipped),
    }
