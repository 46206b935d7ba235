"""A trainer group without engines: it answers from tables, and keeps what it was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.step import PolicyTokens
from pipeline.types import Rollout


class FakeTrainers:
    """Log-probs are those of the rollouts plus `gap`; every update moves them by `move`."""

    def __init__(self, rollouts: Sequence[Rollout], gap: float = 0.0, move: float = 0.5):
        self.rollouts, self.gap, self.move = list(rollouts), gap, move
        self.calls: list[str] = []
        self.updates: list[tuple[object, dict]] = []
        self.loaded = []
        self.sent: list[int] = []
        self.wrong: list[str] = []
        self.norms: list[float] = []
        self.seconds: list[dict[str, tuple[float, float]]] = []

    def _policy(self, indices: Sequence[int], shift: float) -> PolicyTokens:
        rows = [(self.rollouts[i].rollout_logprobs + np.float32(shift)).astype(np.float32) for i in indices]
        return PolicyTokens(rows, [np.full(len(r), 0.5, np.float32) for r in rows], np.array([[10, 9, 0, 0]]))

    def load(self, samples) -> None:
        self.loaded = list(samples)

    def send_weights(self, version: int, servers=(), *, flush: bool = True) -> None:
        self.sent.append(version)

    def send_again(self, version: int, servers=()) -> bool:
        return False

    def take_seconds(self):
        return self.seconds

    def weights_not_finite(self):
        return self.wrong

    def sent_metrics(self):
        return {}

    def logprobs(self, routing=None, indices=None) -> PolicyTokens:
        self.calls.append(f"logprobs {routing}")
        shift = self.gap if routing != "native" else self.gap + 0.25
        return self._policy(range(len(self.rollouts)) if indices is None else indices, shift)

    def record_routes(self, layers: int, num_experts: int) -> PolicyTokens:
        self.calls.append(f"record_routes {layers} {num_experts}")
        return self._policy(range(len(self.rollouts)), self.gap)

    def reference_logprobs(self) -> list[np.ndarray]:
        self.calls.append("reference_logprobs")
        return self._policy(range(len(self.rollouts)), -1.0).logprobs

    def teacher_logprobs(self) -> list[np.ndarray]:
        self.calls.append("teacher_logprobs")
        return self._policy(range(len(self.rollouts)), -2.0).logprobs

    def values(self) -> list[np.ndarray]:
        self.calls.append("values")
        return [np.zeros(len(r), np.float32) for r in self.rollouts]

    def update_policy(self, objective, denominators, rows, skip_above=math.inf):
        self.calls.append("update_policy")
        self.updates.append((denominators, dict(rows)))
        shift = self.gap + self.move * (len(self.updates) - 1)
        norm = self.norms.pop(0) if self.norms else 1.0
        skipped = not norm <= skip_above or not math.isfinite(norm)
        metrics = {"loss/policy": float(len(rows)), "train/grad_norm": norm, "train/skipped_updates": float(skipped)}
        return metrics, self._policy(list(rows), shift)

    def update_critic(self, objective, denominators, rows):
        self.calls.append("update_critic")
        return {"critic/grad_norm": 2.0}
