"""Where in the rollouts the gap lies: by position, by layer, by age of the weights, token by token; and whether the
server samples from the distribution that its log-probs speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import padded
from pipeline.diagnose.bench import Engines
from pipeline.objectives import mismatch_by
from pipeline.step import PolicyTokens
from pipeline.types import Rollout

BUCKETS = 24  # of positions, at most
WORST = 20
CONTEXT = 8  # tokens shown before a worst one
RARE = 10  # improbable tokens that can be absent by chance: at ten expected, once in 20,000


@dataclass(frozen=True)
class WorstToken:
    """One token of those that differ most.

    rollout: its number among the diagnosed ones. position: in the response. before: the text that it follows.
    trainer, server: log-probs, nats.
    """

    rollout: int
    position: int
    before: str
    token: str
    trainer: float
    server: float


@dataclass(frozen=True)
class Calibration:
    """Mean surprisal of the sampled tokens minus mean entropy, both the trainer's, nats a token.

    A token that is drawn from pi has E[-log pi(y_t) | y_<t] = H_t, so that the difference is 0 but for chance; a mask
    on sampling (top-k, top-p, min-p), or sampling at a lower temperature than the log-probs', makes it negative.
    error: standard error of the difference.
    least: what the difference must exceed besides. A policy that is sure of most tokens owes its entropy to tokens that
           are seldom drawn, and where none was, the standard error knows nothing of them.
    """

    difference: float
    error: float
    least: float

    @property
    def off(self) -> bool:
        """Beyond chance: five standard errors, and `least`."""
        return abs(self.difference) > max(5 * self.error, self.least)


def by_position(rollouts: Sequence[Rollout], policy: PolicyTokens) -> list[dict[str, float]]:
    """Mean and largest |l| by position in the response; a row a bucket: start, tokens, abs_logprob, max_abs_logprob."""
    width = -(-max(len(r) for r in rollouts) // BUCKETS)
    return [
        {"start": k * width} | row for k, row in _by(rollouts, policy, [np.arange(len(r)) // width for r in rollouts])
    ]


def by_lag(rollouts: Sequence[Rollout], policy: PolicyTokens, version: int) -> list[dict[str, float]]:
    """The same by how many versions older than the trainer's the weights were that sampled the token."""
    return [{"lag": k} | row for k, row in _by(rollouts, policy, [version - r.weight_versions for r in rollouts])]


def _by(
    rollouts: Sequence[Rollout], policy: PolicyTokens, buckets: Sequence[np.ndarray]
) -> list[tuple[int, dict[str, float]]]:
    mask = padded([np.ones(len(r), bool) for r in rollouts])
    found = mismatch_by(
        padded(policy.logprobs), padded([r.rollout_logprobs for r in rollouts]), mask, padded(list(buckets))
    )
    keys = ("tokens", "abs_logprob", "max_abs_logprob")
    return [(bucket, {key: row[key] for key in keys}) for bucket, row in sorted(found.items())]


def worst_tokens(loop: Engines, rollouts: Sequence[Rollout], policy: PolicyTokens) -> list[WorstToken]:
    """Those whose log-probs differ most."""
    where = [(i, t) for i, r in enumerate(rollouts) for t in range(len(r))]
    gaps = np.concatenate([np.abs(p - r.rollout_logprobs) for p, r in zip(policy.logprobs, rollouts, strict=True)])
    decode, out = loop.source.tokenizer.decode, []
    for k in np.argsort(-gaps, kind="stable")[:WORST]:
        i, t = where[int(k)]
        rollout, at = rollouts[i], len(rollouts[i].prompt_ids) + t
        ids = rollout.token_ids
        out.append(
            WorstToken(
                rollout=i,
                position=t,
                before=str(decode(ids[max(0, at - CONTEXT) : at].tolist())),
                token=str(decode([int(ids[at])])),
                trainer=float(policy.logprobs[i][t]),
                server=float(rollout.rollout_logprobs[t]),
            )
        )
    return out


def calibration(policy: PolicyTokens, vocab_size: int) -> Calibration:
    """Of the tokens that the policy's log-probs and entropies are of. At least two.

    Tokens that n draws miss have about 1/n of the probability, and share it among the vocabulary at most: such a one is
    log(n * vocab_size) nats.
    """
    x = -np.concatenate(policy.logprobs).astype(np.float64) - np.concatenate(policy.entropy)
    least = max(RARE * float(np.log(len(x) * vocab_size)) / len(x), 0.01)  # .01: roundings
    return Calibration(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))), least)
