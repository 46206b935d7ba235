"""The numbers of a step that follow from its batch, its routing, and the two engines' log-probs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.objectives import mismatch_metrics
from pipeline.types import Batch, PolicyTokens, Rollout, padded


class Timer:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Rewards and lengths of a step; lengths count the tokens that the policy sampled."""
    groups = [group for group in batch.groups if len(group.rewards)]
    lengths = np.array([rollout.trained_tokens for rollout in batch.rollouts])
    ends = [episode.last.finish_reason for episode in batch.episodes]
    return {
        "reward/mean": float(batch.rewards.mean()),
        "reward/std": float(batch.rewards.std()),
        "reward/uninformative_groups": float(np.mean([np.ptp(group.rewards) == 0 for group in groups])),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "rollout/retractions": float(sum(rollout.retractions for rollout in batch.rollouts)),
        "response/truncated_fraction": float(np.mean([reason == "length" for reason in ends])),
    }


def routing_metrics(routing: np.ndarray) -> dict[str, float]:
    """Shares over tokens and layers, from counts [layers, 3]: replayed, native selection agreed, fallen back."""
    replayed, agreed, fallen = (int(n) for n in routing.sum(0)) if len(routing) else (0, 0, 0)
    out = {"routing/replayed_fraction": replayed / max(replayed + fallen, 1)}
    if replayed:
        out["routing/agreement"] = agreed / replayed
        out["routing/agreement_worst_layer"] = float((routing[:, 1] / np.maximum(routing[:, 0], 1)).min())
    return out


def mismatch_of(rollouts: Sequence[Rollout], proximal: PolicyTokens) -> dict[str, float]:
    """mismatch_metrics of the tokens that the policy sampled, under both engines.

    Tokens that were sampled over keys and values of older weights have numbers of their own, mixed_kv/fraction,
    mixed_kv/abs_logprob and mixed_kv/max_abs_logprob: no trainer has their log-probs.
    """
    pi, mu = padded(proximal.logprobs), padded([r.rollout_logprobs for r in rollouts])
    metrics = mismatch_metrics(pi, mu, padded([r.comparable for r in rollouts]))
    mixed = padded([r.trained & ~r.comparable for r in rollouts])
    if mixed.any():
        gaps = np.abs(pi - mu)[mixed]
        metrics["mixed_kv/fraction"] = float(mixed.sum() / sum(r.trained_tokens for r in rollouts))
        metrics["mixed_kv/abs_logprob"], metrics["mixed_kv/max_abs_logprob"] = float(gaps.mean()), float(gaps.max())
    return metrics
