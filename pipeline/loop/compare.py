"""How far trainer and rollout engine are apart on the same tokens, and where that stops a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.errors import SamerouteError
from pipeline.observe.metrics import mismatch_of
from pipeline.types import PolicyTokens, Rollout

if TYPE_CHECKING:
    from megatron_ext.network import Routing


class DisagreementError(SamerouteError):
    """Trainer and rollout engine do not hold the same model, or do not compute the same log-probs."""


class Scorer(Protocol):
    """What of a TrainerGroup a comparison asks for."""

    def logprobs(self, routing: Routing | None = None, indices: Sequence[int] | None = None) -> PolicyTokens: ...


def compare(rollouts: Sequence[Rollout], proximal: PolicyTokens, *, version: int, bound: float) -> dict[str, float]:
    """Metrics of how far pi_o is from mu, and the policy's entropy.

    Every token was sampled under the weights that the trainer still holds, so this also proves that the last transfer
    arrived. version: of these weights. bound: largest mean |log pi_o - log mu|, nats. Raises DisagreementError beyond
    it, and where a token was sampled under another version.
    """
    metrics = mismatch_of(rollouts, proximal)
    versions = {int(v) for r in rollouts for v in r.weight_versions[r.trained]}
    if versions != {version}:
        raise DisagreementError(f"tokens were sampled under weights {sorted(versions)}, the trainer holds {version}")
    if not metrics["mismatch/abs_logprob"] <= bound:
        raise DisagreementError(
            f"under weights {version} the log-probs of trainer and server differ by "
            f"{metrics['mismatch/abs_logprob']:.2e} nats on average (largest "
            f"{metrics['mismatch/max_abs_logprob']:.2e}), the bound is {bound:.0e}: the weight "
            "transfer failed, or the engines compute different models; checks.max_abs_logprob sets the bound"
        )
    entropy = [e[r.trained] for e, r in zip(proximal.entropy, rollouts, strict=True)]
    return metrics | {"policy/entropy": float(np.concatenate(entropy).mean())}


def replay_probe(trainers: Scorer, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mismatch of the first of the loaded rollouts with their routes replayed, and with native routing.

    rollouts: those first ones.
    """
    metrics: dict[str, float] = {}
    for routing in ("replay", "native"):
        found = mismatch_of(rollouts, trainers.logprobs(routing, range(len(rollouts))))
        metrics |= {f"probe/{key}_{routing}": found[f"mismatch/{key}"] for key in ("k3", "abs_logprob", "f2")}
    return metrics
