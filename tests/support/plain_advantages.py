"""Every advantage once more, from the equations alone, of numbers; see `plain.py`.

R[i] is the reward of answer i, prompts[i] its prompt, n[i] its trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _others(i: int, prompts: list[int]) -> list[int]:
    return [j for j in range(len(prompts)) if prompts[j] == prompts[i]]


def _std(values: list[float], std: str) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - (std == "sample")))


def group_mean(R: list[float], prompts: list[int], **_: Any) -> list[float]:
    return [R[i] - sum(R[j] for j in _others(i, prompts)) / len(_others(i, prompts)) for i in range(len(R))]


def group_std(R: list[float], prompts: list[int], std: str = "population", epsilon: float = 1e-6) -> list[float]:
    centred = group_mean(R, prompts)
    return [a / (_std([R[j] for j in _others(i, prompts)], std) + epsilon) for i, a in enumerate(centred)]


def leave_one_out(R: list[float], prompts: list[int], **_: Any) -> list[float]:
    return [
        R[i] - sum(R[j] for j in _others(i, prompts) if j != i) / (len(_others(i, prompts)) - 1) for i in range(len(R))
    ]


def mean_relative(R: list[float], prompts: list[int], **_: Any) -> list[float]:
    means = [sum(R[j] for j in _others(i, prompts)) / len(_others(i, prompts)) for i in range(len(R))]
    return [(r - m) / m if m > 0 else 0.0 for r, m in zip(R, means, strict=True)]


def batch_scaled(R: list[float], prompts: list[int], std: str = "population", epsilon: float = 1e-6) -> list[float]:
    centred = group_mean(R, prompts)
    return [a / (_std(centred, std) + epsilon) for a in centred]


def second_moment(log_w: list[float], bound: float) -> list[bool]:
    """Which of the batch's tokens stay: the largest is taken out until the mean square is below the bound."""
    stay = sorted(range(len(log_w)), key=lambda i: abs(log_w[i]))
    while stay and sum(log_w[i] ** 2 for i in stay) / len(stay) >= bound:
        stay.pop()
    return [i in stay for i in range(len(log_w))]


def whiten(rows: list[list[float]], std: str = "population", epsilon: float = 1e-6) -> list[list[float]]:
    """rows: one number a trained token."""
    tokens = [a for row in rows for a in row]
    mean = sum(tokens) / len(tokens)
    return [[(a - mean) / (_std(tokens, std) + epsilon) for a in row] for row in rows]


def rewards_to_go(reward: float, penalties: list[float]) -> list[float]:
    """R - the penalties still to come, at each token."""
    return [reward - sum(penalties[t:]) for t in range(len(penalties))]


def gae(reward: float, penalties: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """sum_k (gamma lam)^k delta_{t+k}; the reward stands on the last token."""
    n = len(values)
    after = [*values[1:], 0.0]
    deltas = [(reward if t == n - 1 else 0.0) - penalties[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


# What a row weighs each trained token by, from the rewards on.


@dataclass(frozen=True)
class Batch:
    """R, prompts: of each answer. k1 = log pi_o - log pi_ref, V, log_w = log pi_o - log mu: of its trained tokens."""

    R: list[float]
    prompts: list[int]
    k1: list[list[float]]
    V: list[list[float]]
    log_w: list[list[float]]

    def at_tokens(self, A: list[float]) -> list[list[float]]:
        return [[a] * len(row) for a, row in zip(A, self.V, strict=True)]


def _mean(b: Batch) -> list[list[float]]:
    return b.at_tokens(group_mean(b.R, b.prompts))


def _standard(b: Batch) -> list[list[float]]:
    return b.at_tokens(group_std(b.R, b.prompts))


def _areal(b: Batch) -> list[list[float]]:
    return whiten(b.at_tokens(group_std(b.R, b.prompts, "sample", 1e-5)), "sample", 1e-5)


def _m2po(b: Batch) -> list[list[float]]:
    stay = iter(second_moment([x for row in b.log_w for x in row], 0.04))
    return [[a if next(stay) else 0.0 for a in row] for row in _standard(b)]


ROWS: dict[str, Callable[[Batch], list[list[float]]]] = {
    "reinforce": _mean,
    "rloo": lambda b: b.at_tokens(leave_one_out(b.R, b.prompts)),
    "reinforce_plus_plus": lambda b: whiten(
        [rewards_to_go(R, [0.01 * k for k in k1]) for R, k1 in zip(b.R, b.k1, strict=True)]
    ),
    "ppo": lambda b: [gae(R, [0.0] * len(V), V, 1.0, 0.95) for R, V in zip(b.R, b.V, strict=True)],
    "maxrl": lambda b: b.at_tokens(mean_relative(b.R, b.prompts)),
    "m2po": _m2po,
    "reinforce_baseline": lambda b: whiten(_mean(b)),
    "scalerl": lambda b: b.at_tokens(batch_scaled(b.R, b.prompts)),
    "areal_dr_grpo": lambda b: whiten(_mean(b), "sample", 1e-5),
    **dict.fromkeys(("dr_grpo", "dr_gspo", "minirl", "dppo_tv", "dppo_kl", "ipo", "icepop"), _mean),
    **dict.fromkeys(("grpo", "dapo", "gspo", "gspo_token", "gmpo", "cispo", "sapo", "vespo", "luspo"), _standard),
    **dict.fromkeys(("areal_grpo", "areal_gspo", "areal_sapo"), _areal),
}


# Credit by turns: r[k] is the reward of turn k of one episode, G[i][k] the return of turn k of episode i.


def returns_by_turn(r: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (j - k) * r[j] for j in range(k, len(r))) for k in range(len(r))]


def over_turn(rule: Callable[..., list[float]], G: list[list[float]], prompts: list[int], **cells: Any) -> Any:
    """A[i][k]: a rule of groups over turn k of those episodes of a prompt that have one; 0 where there is one only."""
    A = [[0.0] * len(row) for row in G]
    for k in range(max(map(len, G))):
        for prompt in set(prompts):
            there = [i for i in range(len(G)) if prompts[i] == prompt and len(G[i]) > k]
            if len(there) > 1:
                for i, a in zip(there, rule([G[i][k] for i in there], [prompt] * len(there), **cells), strict=True):
                    A[i][k] = a
    return A


def gae_by_turn(r: list[float], V: list[float], gamma: float, lam: float) -> list[float]:
    """V[k]: where turn k begins."""
    after = [*V[1:], 0.0]
    deltas = [r[k] + gamma * after[k] - V[k] for k in range(len(r))]
    return [sum((gamma * lam) ** j * deltas[k + j] for j in range(len(r) - k)) for k in range(len(r))]
