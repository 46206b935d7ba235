"""How far trainer and rollout engine are apart on the same tokens, and where that stops a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.errors import SamerouteError
from pipeline.observe.metrics import mismatch_by_lag, mismatch_of
from pipeline.step import PolicyTokens
from pipeline.types import Rollout

if TYPE_CHECKING:
    from megatron_ext.network import Routing
    from pipeline.rollout.answers import Scored


class DisagreementError(SamerouteError):
    """Trainer and rollout engine do not hold the same model, or do not compute the same log-probs."""


class Scorer(Protocol):
    """What of a TrainerGroup a comparison asks for."""

    def logprobs(self, routing: Routing | None = None, indices: Sequence[int] | None = None) -> PolicyTokens: ...


def compare(
    rollouts: Sequence[Rollout], proximal: PolicyTokens, *, version: int, bound: float, staleness: int = 0
) -> dict[str, float]:
    """Metrics of how far pi_o is from mu, and the policy's entropy.

    version: of the weights that the trainer holds. staleness: so many versions older a token may be.
    With staleness 0 every token was sampled under these weights, so this also proves that the last transfer arrived;
    bound: largest mean |log pi_o - log mu|, nats. With more, training has moved pi_o away from mu, which no bound can
    tell from a mistake: the metrics are called staleness/ and are apart by lag, and `compare_scored` is the proof.
    Raises DisagreementError beyond the bound, and where a token was sampled under any other version.
    """
    metrics = mismatch_of(rollouts, proximal)
    versions = {int(v) for r in rollouts for v in r.weight_versions[r.trained]}
    if not versions <= set(range(version - staleness, version + 1)) or not versions:
        older = f", and rollout.max_staleness is {staleness}" if staleness else ""
        raise DisagreementError(
            f"tokens were sampled under weights {sorted(versions)}, the trainer holds {version}{older}"
        )
    entropy = [e[r.trained] for e, r in zip(proximal.entropy, rollouts, strict=True)]
    metrics |= {"policy/entropy": float(np.concatenate(entropy).mean())}
    if staleness:
        return _as_staleness(metrics) | mismatch_by_lag(version, rollouts, proximal)
    if not metrics["mismatch/abs_logprob"] <= bound:
        raise DisagreementError(
            f"under weights {version} the log-probs of trainer and server differ by "
            f"{metrics['mismatch/abs_logprob']:.2e} nats on average (largest "
            f"{metrics['mismatch/max_abs_logprob']:.2e}), the bound is {bound:.0e}: the weight "
            "transfer failed, or the engines compute different models; checks.max_abs_logprob sets the bound"
        )
    return metrics


def scored_rollouts(scored: Sequence[Scored], version: int) -> list[Rollout]:
    """As if servers that hold `version` had sampled these sequences, at temperature 1 from the whole vocabulary."""
    return [
        Rollout(
            prompt_ids=rollout.prompt_ids,
            response_ids=rollout.response_ids,
            rollout_logprobs=logprobs[len(rollout.prompt_ids) - 1 :],
            routes=routes,
            weight_versions=np.full(len(rollout), version, np.int32),
            finish_reason=rollout.finish_reason,
        )
        for rollout, logprobs, routes in scored
    ]


def compare_scored(
    rollouts: Sequence[Rollout], policy: PolicyTokens, *, version: int, bound: float
) -> dict[str, float]:
    """`compare` of what the servers scored under the trainer's weights: that the last transfer arrived, where nothing
    that a step trains on was sampled since. Raises DisagreementError also where that is no token."""
    tokens = sum(map(len, rollouts))
    if not tokens:
        raise DisagreementError(f"no token was scored under weights {version}, so that nothing was compared")
    found = compare(rollouts, policy, version=version, bound=bound)
    return {k: v for k, v in found.items() if k.startswith("mismatch/")} | {"staleness/scored_tokens": float(tokens)}


def _as_staleness(metrics: dict[str, float]) -> dict[str, float]:
    """mismatch/ is what is between the engines alone."""
    return {key.replace("mismatch/", "staleness/"): value for key, value in metrics.items()}


def replay_probe(trainers: Scorer, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mismatch of the first of the loaded rollouts with their routes replayed, and with native routing.

    rollouts: those first ones.
    """
    metrics: dict[str, float] = {}
    for routing in ("replay", "native"):
        found = mismatch_of(rollouts, trainers.logprobs(routing, range(len(rollouts))))
        metrics |= {f"probe/{key}_{routing}": found[f"mismatch/{key}"] for key in ("k3", "abs_logprob", "f2")}
    return metrics
