"""The tables of docs/exercise.md: the tutorial's exercise and four of its remarks, from sums over everything.

    .venv/bin/python -m scripts.exercise

Nothing is sampled. tests/scripts/test_exercise.py holds the page against what this prints, and the closed forms against
enumeration. Takes a second on one core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.objectives.terms.advantages import group_mean, group_std, leave_one_out, whiten
from tests.support.enumeration import Tree, gradient_of_mean, logprobs, probabilities, tree, weighted_variance

SIGMA2 = 3e-3
"""Var(delta) of one token: twice the published k3 of 1.5e-3."""
RARE = torch.tensor([0.05, 0.45, 0.5], dtype=torch.float64)
PUSH = torch.tensor([0.03, -0.01, -0.02], dtype=torch.float64)
"""Three tokens of which one is rare, and a move that makes it likelier: delta is skewed to the right."""
LENGTHS = (2, 8, 64, 512)


def token(sign: float, sigma2: float = SIGMA2) -> tuple[Tensor, Tensor]:
    """(mu, 1 + delta) of one token: PUSH or its opposite, scaled so that Var(delta) is sigma2."""
    delta = PUSH / RARE
    return RARE, 1 + sign * delta * math.sqrt(sigma2 / float((RARE * delta.square()).sum()))


def estimators(mu: Tensor, ratio: Tensor, length: int) -> dict[str, float]:
    """Of g1 = 1 + sum delta and s~ = 1 + N (s - 1) against t = prod (1 + delta), for N tokens drawn alike: exact.

    variance of each; mean of t - s~ (that of t - g1 is 0); root mean square of each error.
    """

    def moment(power: float) -> float:
        return float((mu * ratio**power).sum())

    N = length
    sigma2 = moment(2) - 1
    s, ss, ts = moment(1 / N) ** N, moment(2 / N) ** N, moment(1 + 1 / N) ** N
    square_of_t = (1 + sigma2) ** N
    mean, square = 1 + N * (s - 1), 1 + 2 * N * (s - 1) + N**2 * (ss - 2 * s + 1)
    return {
        "variance_g1": N * sigma2,
        "variance_s": N**2 * (ss - s**2),
        "bias_s": 1 - mean,
        "rms_g1": math.sqrt(max(square_of_t - 1 - N * sigma2, 0.0)),
        "rms_s": math.sqrt(square_of_t - 2 * (1 - N + N * ts) + square),
    }


def errors() -> list[str]:
    """The exercise: error and variance by length, for either skew."""
    rows = [
        "| skew | N | mean of t - s~ | rms of t - g1 | rms of t - s~ | Var(g1) | Var(s~) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sign in (("right", 1.0), ("left", -1.0)):
        for length in LENGTHS:
            e = estimators(*token(sign), length)
            numbers = (e["bias_s"], e["rms_g1"], e["rms_s"], e["variance_g1"], e["variance_s"])
            rows.append(f"| {name} | {length} | " + " | ".join(f"{x:.3g}" for x in numbers) + " |")
    return rows


# A small policy: V = 3, at most 3 tokens, token 0 stops.

SMALL = tree(vocabulary=3, length=3)


def small_policy(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(logits, probability of every sequence)."""
    logits = torch.randn(SMALL.rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, probabilities(logprobs(logits, SMALL))


def scores(logits: Tensor, sequences: Tree) -> Tensor:
    """[M, rows * V]: grad log pi of each sequence."""
    logits = logits.detach().requires_grad_()
    each = logprobs(logits, sequences).sum(-1)
    return torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0].flatten() for x in each])


def per_length() -> list[str]:
    """||E[sum_i sum_t score / denominator]||, A = 1: what a constant advantage still teaches, on policy."""
    logits, p = small_policy()
    grads, n = scores(logits, SMALL), SMALL.lengths
    rows = ["| divided by | B = 1 | 2 | 3 | 4 |", "|---|---|---|---|---|"]
    found = {"1/N of each answer": [], "the tokens of the batch": [], "nothing, or a constant": []}
    for size in (1, 2, 3, 4):
        batches = torch.cartesian_prod(*[torch.arange(len(p))] * size).view(-1, size)
        weight = p[batches].prod(-1)
        for name, denominators in (
            ("1/N of each answer", size * n[batches]),
            ("the tokens of the batch", n[batches].sum(-1, keepdim=True).expand_as(batches)),
            ("nothing, or a constant", torch.full(batches.shape, float(size), dtype=torch.float64)),
        ):
            share = torch.zeros_like(p).index_add(0, batches.flatten(), (weight[:, None] / denominators).flatten())
            found[name].append((share[:, None] * grads).sum(0).norm().item())
    for name, norms in found.items():
        rows.append(f"| {name} | " + " | ".join(f"{x:.4f}" for x in norms) + " |")
    return rows


def rewards_of_prompts() -> Tensor:
    """[3 prompts, M]: rewards of 0 or 1; a hard prompt, a middling one, an easy one, under one policy."""
    _, p = small_policy()
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(3)).tolist()
    rewards = torch.zeros(3, len(p), dtype=torch.float64)
    for row, share in zip(rewards, (0.1, 0.5, 0.9), strict=True):
        for answer in order:
            if float((row * p).sum() + p[answer]) <= share:
                row[answer] = 1.0
    return rewards


def total_variance() -> list[str]:
    """The law of total variance for the reward, and what a baseline does to the gradient's variance (its trace)."""
    logits, p = small_policy()
    grads, rewards = scores(logits, SMALL), rewards_of_prompts()
    means = (rewards * p).sum(-1, keepdim=True)
    within = torch.stack([weighted_variance(r, p) for r in rewards]).mean()
    between = means.var(correction=0)
    weight = p.expand_as(rewards) / len(rewards)
    squares = grads.square().sum(-1)
    best = (rewards * p * squares).sum(-1, keepdim=True) / (p * squares).sum()

    def of_reward(baseline: Tensor) -> float:
        return weighted_variance((rewards - baseline).flatten(), weight.flatten()).item()

    def of_gradient(baseline: Tensor) -> float:
        estimate = (rewards - baseline)[..., None] * grads
        mean = (weight[..., None] * estimate).sum((0, 1))
        return (weight * (estimate - mean).square().sum(-1)).sum().item()

    rows = [
        "| baseline | Var of the reward | of it between prompts | trace of Var of the gradient |",
        "|---|---|---|---|",
    ]
    overall = means.mean()
    for name, b, rest in (
        ("none", torch.zeros_like(means), between),
        ("one for all prompts", overall.expand_as(means), between),
        ("E[R] of the prompt", means, torch.zeros(())),
        ("the best of the prompt", best, (means - best).var(correction=0)),
    ):
        rows.append(f"| {name} | {of_reward(b):.4f} | {float(rest):.4f} | {of_gradient(b):.4f} |")
    assert abs(of_reward(torch.zeros_like(means)) - float(within + between)) < 1e-14
    return rows


def batch_directions(prompts: int = 2, group: int = 3) -> dict[str, Tensor]:
    """Mean gradient [prompts, rows * V] by advantage, over every batch of answers to the prompts of `short_rewards`:
    the part of each prompt, a mean over its answers.

    An advantage reads rewards and lengths alone, so answers alike in both are one class, with its probability and the
    mean of its scores.
    """
    _, p, grads = short_policy()
    longest = int(SHORT.lengths.max())
    kind = (short_rewards() * longest + SHORT.lengths - 1).long()  # [prompts, M]
    member = torch.nn.functional.one_hot(kind, 2 * longest).double() * p[:, None]  # [prompts, M, classes]
    chance = member.sum(1)
    score = torch.einsum("kmc,md->kcd", member, grads) / chance.clamp(min=1e-300)[..., None]
    batches = torch.tensor(list(itertools.product(range(2 * longest), repeat=prompts * group)))
    ids = torch.arange(prompts).repeat_interleave(group)
    weight = chance[ids.expand_as(batches), batches].prod(-1)
    batches, weight = batches[weight > 0], weight[weight > 0]
    R, N = (batches // longest).double(), batches % longest + 1
    unique = (torch.arange(len(batches))[:, None] * prompts + ids).flatten()
    advantages = {
        "R - mean": group_mean(R.flatten(), unique).view_as(R),
        "R - mean of the others": leave_one_out(R.flatten(), unique).view_as(R),
        "(R - mean)/std": group_std(R.flatten(), unique).view_as(R),
    }
    masks = torch.arange(longest) < N[..., None]
    for name in ("R - mean", "(R - mean)/std"):
        rows = [whiten(a, m) for a, m in zip(advantages[name], masks, strict=True)]
        advantages[f"{name}, whitened"] = torch.stack(rows)
    out = {}
    for name, A in advantages.items():
        each = torch.einsum("b,bi,bid->id", weight, A, score[ids.expand_as(batches), batches])
        out[name] = torch.stack([each[ids == k].mean(0) for k in range(prompts)])
    return out


SHORT = tree(vocabulary=3, length=2)


def short_policy() -> tuple[Tensor, Tensor, Tensor]:
    """(logits, probabilities [M], scores [M, rows * V]) of sequences of at most 2 tokens; about half stop at once."""
    logits = torch.randn(SHORT.rows, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits[0, 0] = logits[0, 1:].logsumexp(0)
    return logits, probabilities(logprobs(logits, SHORT)), scores(logits, SHORT)


def short_rewards() -> Tensor:
    """[2 prompts, M]: both reward answers of two tokens, the hard one a single one of them, the easy one the others."""
    whole = SHORT.lengths == 2
    hard = whole & (SHORT.tokens[:, 0] == 1) & (SHORT.tokens[:, 1] == 2)
    return torch.stack([hard, whole & ~hard]).double()


def normalisation() -> list[str]:
    """What the mean gradient of a batch of two prompts, three answers each, is of the true one, by advantage."""
    logits, p, _ = short_policy()
    rewards = short_rewards()
    truth = torch.stack([gradient_of_mean(r, logits, SHORT).flatten() for r in rewards])
    chances = (rewards * p).sum(-1).tolist()
    rows = [
        f"| advantage | weight of p = {chances[0]:.2f} | of p = {chances[1]:.2f} | off the true direction |",
        "|---|---|---|---|",
    ]
    for name, parts in batch_directions().items():
        weights = (parts * truth).sum(-1) / truth.square().sum(-1)
        found, wanted = parts.sum(0), truth.sum(0)
        scale = (found @ wanted) / (wanted @ wanted)
        off = (found / scale - wanted).norm() / wanted.norm()
        rows.append(f"| {name} | {weights[0].item():.3f} | {weights[1].item():.3f} | {off.item():.3f} |")
    return rows


TABLES = {
    "Error and variance": errors,
    "Dividing by the length": per_length,
    "Total variance": total_variance,
    "Batch normalisation": normalisation,
}


def lines() -> Sequence[str]:
    """All tables, with their names."""
    return [line for name, table in TABLES.items() for line in ("", f"## {name}", "", *table())]


if __name__ == "__main__":
    print("\n".join(lines()))
