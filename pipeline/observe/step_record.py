"""What is no single number of a step: routing by layer, histograms of log-ratios, the tokens of a few rollouts.

records.jsonl holds an object a step:

    step           its number
    pass_rates     [11]: groups by the share of their answers that pass, in tenths
    routing        [layers][4]: tokens replayed, of these the trainer's own router agreed, tokens fallen back, tokens of
                   which a floor refused an expert
    ratios         name -> {level, counts, nonfinite, bounds}, "proximal/rollout" and "current/proximal":
                   counts of log-ratios by BIN_EDGES, over tokens or over sequences (their mean log-ratio)
    ranks          phase -> {own, waited}, each [trainer ranks] seconds, see `stragglers.rank_seconds`
    servers        number -> {tokens, seconds}: sampled, and what its requests took

and rollouts/step_000012.json a list of the rollouts that step_000012.txt shows, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.observe.rollout_text import pick
from pipeline.observe.stragglers import rank_seconds, server_seconds
from pipeline.text.characters import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.objectives import Objective
    from pipeline.step import StepResult
    from pipeline.types import Episode

TOKENS_SHOWN = 512
"""Of one answer; of a conversation each turn, and what others said between, has its share. The text file has all."""
SHARE_SHOWN = 64
"""That each of them has at least."""

SMALLEST, LARGEST, PER_DECADE = -8, 1, 5
_DECADES = 10.0 ** (np.arange(SMALLEST * PER_DECADE, LARGEST * PER_DECADE + 1) / PER_DECADE)
BIN_EDGES = np.concatenate([-_DECADES[::-1], _DECADES])
"""[92] float64, log-ratios in nats: five bins a decade from 1e-8 to 10 on either side of 0. What lies between
-1e-8 and 1e-8 is the bin in the middle, what lies beyond 10 are the outermost two: 93 bins."""


def step_record(result: StepResult, objective: Objective, passing_reward: float = 1.0) -> dict[str, Any]:
    """A line of records.jsonl. Log-ratios are those of the tokens that the policy sampled."""
    rollouts = result.batch.rollouts
    mu, proximal, current = (
        [row[r.trained] for row, r in zip(rows, rollouts, strict=True)]
        for rows in ([r.rollout_logprobs for r in rollouts], result.proximal.logprobs, result.current_logprobs)
    )
    cells = objective.composition
    # What the surrogate clips: GMPO's ratio is per sequence, but its clip is on tokens.
    level = "token" if cells.ratio == "token" or cells.surrogate == "log_space_clip" else "sequence"
    update = histogram(current, proximal, level)
    return {
        "step": result.batch.step,
        "routing": np.asarray(result.proximal.routing).tolist(),
        "pass_rates": pass_rate_counts([group.rewards for group in result.batch.groups], passing_reward),
        "ratios": {
            "proximal/rollout": histogram(proximal, mu, "token") | {"bounds": [None, None]},
            "current/proximal": update | {"bounds": clip_bounds(objective)},
        },
        "ranks": rank_seconds(result.ranks),
        "servers": server_seconds(rollouts),
    }


def pass_rate_counts(rewards: Sequence[np.ndarray], passing_reward: float) -> list[int]:
    """Counts [11] of groups by the share of their graded answers that pass, rounded to tenths."""
    rates = [float((own >= passing_reward).mean()) for own in rewards if len(own)]
    return np.bincount(np.round(10 * np.array(rates)).astype(int), minlength=11).tolist()


def histogram(numerator: Sequence[np.ndarray], denominator: Sequence[np.ndarray], level: str) -> dict[str, Any]:
    """Counts [93] of log-ratios by BIN_EDGES.

    numerator, denominator: [N] log-probs a sequence. level: "token", or "sequence" for the mean over its tokens.
    A log-ratio that is not finite is in no bin, but in `nonfinite`.
    """
    rows = [n.astype(np.float64) - d for n, d in zip(numerator, denominator, strict=True) if len(n)]
    values = np.concatenate([*rows, np.zeros(0)]) if level == "token" else np.array([row.mean() for row in rows])
    finite = values[np.isfinite(values)]
    counts = np.bincount(np.searchsorted(BIN_EDGES, finite, side="right"), minlength=len(BIN_EDGES) + 1)
    return {"level": level, "counts": counts.tolist(), "nonfinite": len(values) - len(finite)}


def clip_bounds(objective: Objective) -> list[float | None]:
    """The log-ratios current/proximal beyond which the surrogate clips, below and above; None where it does not."""
    cells = objective.composition
    low, high = cells.clip_low, cells.clip_high
    if cells.surrogate in ("reinforce", "soft_gate", "trust_region", "gamma_gate") or cells.ratio_to == "rollout":
        return [None, None]
    if cells.surrogate == "log_space_clip":
        return [None if low is None else -low, high]
    return [
        None if low is None or low >= 1 else math.log1p(-low),
        None if high is None else math.log1p(high),
    ]


def shown_rollouts(result: StepResult, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    """Up to `count` answers, those that rollout_text shows too, with the log-probs of all three policies. A
    conversation is one answer, its rollouts one behind the other.

    Each: prompt, index, sample, samples, metadata, reward, advantage (of the first token), finish_reason, versions,
    length; turns: reward (null: not given) and advantage of each, whether it begins another rollout, and its calls of
    tools (name, arguments, result); runs: tokens
    of each turn, and of what others said between, in order; and of the tokens that are shown: turn, text, rollout,
    proximal, current (log-probs, nats), entropy (nats), all but the text null where the policy did not sample it.
    """
    position_of = {id(rollout): i for i, rollout in enumerate(result.batch.rollouts)}
    out = []
    for group, sample in pick([g for g in result.batch.groups if len(g.rewards)], count):
        episode = group.episodes[sample]
        own = [position_of.get(id(rollout)) for rollout in episode.rollouts]
        if None in own:  # an episode that failed is not trained on
            continue
        head = {
            "prompt": group.prompt.text,
            "index": group.prompt.index,
            "sample": sample,
            "samples": len(group.episodes),
            "metadata": {key: shortened(str(value)) for key, value in group.prompt.metadata.items()},
            "reward": _short(np.float32(episode.reward)),
            "finish_reason": episode.last.finish_reason,
        }
        out.append(head | _shown_tokens(result, episode, [i for i in own if i is not None], tokenizer))
    return out


def _shown_tokens(
    result: StepResult, episode: Episode, own: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a record says of an answer's turns and tokens. own: positions of its rollouts in the batch."""
    rollouts, numbers = episode.rollouts, episode.turn_numbers
    starts = np.flatnonzero(np.diff(numbers, prepend=-2))
    runs = np.diff(np.append(starts, len(numbers)))
    share = max(SHARE_SHOWN, TOKENS_SHOWN // max(1, len(runs)))
    shown = [start + np.arange(min(n, share)) for start, n in zip(starts, runs, strict=True)]
    chosen = np.concatenate([np.zeros(0, int), *shown])
    ids = np.concatenate([r.response_ids for r in rollouts])[chosen]
    advantages = np.concatenate([np.broadcast_to(result.advantages[i], len(result.batch.rollouts[i])) for i in own])
    begins = {0, *np.cumsum([rollout.turns for rollout in rollouts]).tolist()}
    versions = {v for r in rollouts for v in r.weight_versions[r.trained].tolist()}
    rewards = episode.turn_rewards
    columns = {
        "rollout": [r.rollout_logprobs for r in rollouts],
        "proximal": [result.proximal.logprobs[i] for i in own],
        "current": [result.current_logprobs[i] for i in own],
        "entropy": [result.proximal.entropy[i] for i in own],
    }
    return {
        "advantage": _short(float(advantages[0])) if len(advantages) else None,
        "versions": sorted(versions),
        "length": len(numbers),
        "turns": [
            {
                "reward": None if rewards is None else _short(rewards[k]),
                "advantage": _short(float(advantages[start])),
                "anew": k > 0 and k in begins,
                "calls": [list(map(shortened, call)) for call in episode.calls[k]] if episode.calls else [],
            }
            for k, start in enumerate(s for s in starts if numbers[s] >= 0)
        ],
        "runs": runs.tolist(),
        "turn": [int(k) if k >= 0 else None for k in numbers[chosen]],
        "text": [tokenizer.decode([token]) for token in ids.tolist()],
    } | {name: _row(np.concatenate(rows)[chosen], numbers[chosen] >= 0) for name, rows in columns.items()}


def _row(values: np.ndarray, sampled: np.ndarray) -> list[float | None]:
    return [_short(value) if own else None for value, own in zip(values, sampled, strict=True)]


def _short(value: np.floating[Any] | float) -> float | None:
    """The shortest decimal that reads back as the same float32; None for what is no number in JSON."""
    return float(str(np.float32(value))) if math.isfinite(value) else None
