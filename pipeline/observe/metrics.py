"""The numbers of a step that follow from its batch, its routing, and the two engines' log-probs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.arrays import padded
from pipeline.objectives import mismatch_by, mismatch_metrics
from pipeline.step import Batch, PolicyTokens
from pipeline.types import Rollout


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
    """Rewards, what each verifier gave, and lengths of a step, over the answers that are trained on; lengths count the
    tokens that the policy sampled."""
    groups = [group for group in batch.groups if len(group.rewards)]
    lengths = np.array([rollout.trained_tokens for rollout in batch.rollouts])
    ends = [episode.last.finish_reason for episode in batch.episodes]
    given: dict[str, list[float]] = {}
    for episode in batch.episodes:
        for name, reward in episode.parts.items():
            given.setdefault(f"reward/{name}", []).append(reward)
    return {name: float(np.mean(rewards)) for name, rewards in given.items()} | {
        "reward/mean": float(batch.rewards.mean()),
        "reward/std": float(batch.rewards.std()),
        "reward/uninformative_groups": float(np.mean([np.ptp(group.rewards) == 0 for group in groups])),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "rollout/retractions": float(sum(rollout.retractions for rollout in batch.rollouts)),
        "response/truncated_fraction": float(np.mean([reason == "length" for reason in ends])),
    }


def lag_metrics(batch: Batch) -> dict[str, float]:
    """How many versions the sampled tokens of a step are behind its weights: shares by lag, mean, largest, and the
    share of the answers whose tokens are of several versions."""
    versions = [rollout.weight_versions[rollout.trained] for rollout in batch.rollouts]
    lags = batch.version - np.concatenate(versions)
    shares = np.bincount(lags) / len(lags)
    return {f"rollout/lag_{lag}": float(share) for lag, share in enumerate(shares)} | {
        "rollout/lag_mean": float(lags.mean()),
        "rollout/lag_max": float(lags.max()),
        "rollout/spanning_versions": float(np.mean([len(np.unique(own)) > 1 for own in versions])),
    }


def mismatch_by_lag(batch_version: int, rollouts: Sequence[Rollout], proximal: PolicyTokens) -> dict[str, float]:
    """k3 and mean |l| of the tokens of each lag: at 0 the engines alone, beyond it what training moved as well."""
    mu, lags = ([getattr(r, name) for r in rollouts] for name in ("rollout_logprobs", "weight_versions"))
    by_lag = mismatch_by(
        padded(proximal.logprobs), padded(mu), padded([r.trained for r in rollouts]), batch_version - padded(lags)
    )
    return {f"staleness/{key}_lag_{lag}": found[key] for lag, found in by_lag.items() for key in ("k3", "abs_logprob")}


def routing_metrics(routing: np.ndarray) -> dict[str, float]:
    """Shares over tokens and layers, from counts [layers, 4]: replayed, native choice agreed, fallen back, refused."""
    replayed, agreed, fallen, refused = (int(n) for n in routing.sum(0)) if len(routing) else (0, 0, 0, 0)
    out = {"routing/replayed_fraction": replayed / max(replayed + fallen, 1)}
    if replayed:
        out["routing/agreement"] = agreed / replayed
        out["routing/refused_fraction"] = refused / replayed
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
