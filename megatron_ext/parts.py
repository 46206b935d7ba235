"""What one rank answers, and how the answers of all ranks become one. Neither torch nor Megatron is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_ext.joined import join, split

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


RecordedRoutes = dict[int, tuple[tuple[int, ...], np.ndarray]]
"""sample index -> (layers of this pipeline stage with a router, routes [input tokens, these layers, topk] int16)."""


@dataclass(frozen=True)
class TokenPart:
    """One rank's numbers for response tokens. Empty on ranks that do not speak for their replica.

    quantities: what the model says of each token (a policy: log-prob, entropy; a critic: value), each
                sample index -> [N] float32.
    routing:    layer -> (tokens replayed, of these native selection agreed, tokens fallen back, tokens of which a floor
                refused an expert).
    routes:     what the routers recorded, where they were to; of every pipeline stage.
    """

    quantities: tuple[dict[int, np.ndarray], ...] = ()
    routing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    routes: RecordedRoutes = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Its arrays travel as few large ones."""
        rows = [(list(each), join(list(each.values()))) for each in self.quantities]
        return vars(self) | {"quantities": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = [dict(zip(keys, split(arrays), strict=True)) for keys, arrays in state["quantities"]]
        vars(self).update(state | {"quantities": tuple(rows)})


@dataclass(frozen=True)
class UpdatePart:
    """One rank's answer to an update. grad_norm, lr and skipped are equal on all ranks.

    seen: what the forward pass said, under the weights before the step.
    """

    metrics: Metrics
    grad_norm: float
    lr: float
    skipped: bool
    seen: TokenPart


def merge_tokens(parts: Sequence[TokenPart], count: int) -> tuple[list[np.ndarray], ...]:
    """Join the quantities of all ranks: for each, one [N] array a sample, in the order of the samples.

    count: how many samples were asked for. Raises RuntimeError where a sample has no answer.
    """
    out = []
    for k in range(max(len(p.quantities) for p in parts)):
        rows: dict[int, np.ndarray] = {}
        for part in parts:
            if part.quantities:
                rows |= part.quantities[k]
        absent = [i for i in range(count) if i not in rows]
        if absent:
            raise RuntimeError(f"no rank answered for samples {absent[:10]}")
        out.append([rows[i] for i in range(count)])
    return tuple(out)


def merge_routing(parts: Sequence[TokenPart]) -> np.ndarray:
    """[layers, 4] int64 of all ranks, of the columns of TokenPart.routing; zero without a router."""
    layers = 1 + max((layer for p in parts for layer in p.routing), default=-1)
    routing = np.zeros((layers, 4), np.int64)
    for part in parts:
        for layer, counts in part.routing.items():
            routing[layer] += counts
    return routing


def merge_routes(parts: Sequence[TokenPart], count: int, layers: int, dtype: np.dtype) -> list[np.ndarray]:
    """The recorded routes of all pipeline stages: [input tokens, layers, topk] a sample, rows of zeros at layers
    without a router. Raises RuntimeError where a sample was not recorded."""
    out: dict[int, np.ndarray] = {}
    for part in parts:
        for index, (have, rows) in part.routes.items():
            if index not in out:
                out[index] = np.zeros((len(rows), layers, rows.shape[-1]), dtype)
            out[index][:, list(have)] = rows
    absent = [i for i in range(count) if i not in out]
    if absent:
        raise RuntimeError(f"no rank recorded routes of samples {absent[:10]}")
    return [out[i] for i in range(count)]


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


@dataclass(frozen=True)
class NotFinite:
    """What one rank has that is not finite.

    kind:   "weight", or "output" of a module whose inputs were finite.
    name:   of the parameter or the module, layers and experts counted over the whole model, from 0.
    layer, expert: None where it is in none.
    wrong, of: numbers that are not finite, and how many there are.
    depth, order: of an output: what comes first in the model, and in a rank's pass.
    """

    kind: Literal["weight", "output"]
    name: str
    layer: int | None
    expert: int | None
    wrong: int
    of: int
    depth: int = 0
    order: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.wrong:,} of {self.of:,} numbers)"
