"""What one rank answers, and how the answers of all ranks become one. Neither torch nor Megatron is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["mean", "sum", "max"]
Metrics = dict[str, tuple[float, float, Kind]]
"""name -> (total, count, kind), so that a metric reduces exactly over micro-batches and ranks: a mean is the sum of
totals over the sum of counts, a sum the sum of totals, a max the largest total."""


def add_metrics(into: Metrics, share: Metrics) -> None:
    """Add a micro-batch's, or a rank's, share."""
    for name, (total, count, kind) in share.items():
        before = into.get(name)
        if before is None:
            into[name] = (total, count, kind)
        elif kind == "max":
            into[name] = (max(before[0], total), before[1] + count, kind)
        else:
            into[name] = (before[0] + total, before[1] + count, kind)


@dataclass(frozen=True)
class LogprobPart:
    """One rank's answer to `Trainer.logprobs`. Empty on ranks that do not speak for their replica.

    logprobs: sample index -> [N] float32.  entropy: likewise.
    routing:  layer -> (tokens replayed, of these native selection agreed, tokens fallen back).
    """

    logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    entropy: dict[int, np.ndarray] = field(default_factory=dict)
    routing: dict[int, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdatePart:
    """One rank's answer to `Trainer.update`. grad_norm, lr and skipped are equal on all ranks.

    seen: the log-probs, entropies and routing of the forward pass, under the weights before the step.
    """

    metrics: Metrics
    grad_norm: float
    lr: float
    skipped: bool
    seen: LogprobPart


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
    """Join the parts of all ranks into one number a metric. A mean over nothing is left out."""
    metrics: Metrics = {}
    for part in parts:
        add_metrics(metrics, part.metrics)
    out = {
        name: total / count if kind == "mean" else total
        for name, (total, count, kind) in metrics.items()
        if kind != "mean" or count
    }
    return out | {
        "train/grad_norm": parts[0].grad_norm,
        "train/lr": parts[0].lr,
        "train/skipped_updates": float(parts[0].skipped),
    }
