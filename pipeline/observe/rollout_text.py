"""Sampled rollouts as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.text.characters import shortened, visible
from pipeline.types import Episode, Group, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LINE = 100  # characters of a table of tokens


def pick(groups: Sequence[Group], count: int) -> list[tuple[Group, int]]:
    """Up to `count` (group, rollout) positions: of prompts spread over the step the best and the worst answer each, and
    only where that is not enough the others."""
    longest = max((len(g.episodes) for g in groups), default=0)
    prompts = min(len(groups), math.ceil(count / max(1, min(2, longest))))
    # Every other one is moved by a place, because mini-batches are dealt in turn, and all of them shall be seen.
    shift = len(groups) >= 2 * prompts
    places = [(2 * k + 1) * len(groups) // (2 * prompts) - k % 2 * shift for k in range(prompts)]
    ranked = [(groups[place], _best_and_worst_first(groups[place])) for place in places]
    extremes = [(group, i) for group, order in ranked for i in order[:2]]
    others = [(group, order[k]) for k in range(2, longest) for group, order in ranked if k < len(order)]
    return (extremes + others)[:count]


def _best_and_worst_first(group: Group) -> list[int]:
    """Of those with a reward; answers that could not be graded come last."""
    samples = list(range(len(group.episodes)))
    graded = [i for i in samples if group.episodes[i].reward is not None]
    first = graded
    if len(graded) > 1:
        rewards = group.rewards
        first = [graded[int(np.argmax(rewards))], graded[len(graded) - 1 - int(np.argmin(rewards[::-1]))]]
    return list(dict.fromkeys([*first, *graded, *samples]))


def rollout_text(group: Group, position: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt, response, reward, finish, weight versions, and every token with its log-prob (nats).

    What would act on a terminal is shown in its place: see pipeline.text.characters.visible.
    """
    episode = group.episodes[position]
    rollout = episode.last
    reward = f"{episode.reward:.3f}" if episode.reward is not None else episode.failure or "not graded"
    if len(episode.parts) > 1:
        reward += f" ({', '.join(f'{name} {part:.3g}' for name, part in episode.parts.items())})"
    lines = [
        f"=== prompt {group.prompt.index}, sample {position} of {len(group.episodes)} ===",
        f"reward    {reward}",
        f"finish    {rollout.finish_reason} after {len(rollout)} tokens",
        f"versions  {_versions(rollout.weight_versions)}",
        f"log-prob  {_total(rollout)}",
    ]
    if episode.turns > 1:
        lines += [f"turns     {episode.turns}{_by_turn(episode)}"]
    lines += [f"origin    {group.prompt.origin}"] if group.prompt.origin else []
    lines += [f"{key:<9} {shortened(str(value))}" for key, value in group.prompt.metadata.items()]
    response = tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=False)
    lines += ["--- prompt", group.prompt.text, "--- response", str(response), "--- tokens (log-prob, nats)"]
    return visible("\n".join(lines + _tokens(rollout, tokenizer)) + "\n")


def _by_turn(episode: Episode) -> str:
    rollouts = f" in {len(episode.rollouts)} rollouts, of which this is the last" if len(episode.rollouts) > 1 else ""
    rewards = ", ".join(f"{reward:.3g}" for reward in episode.turn_rewards or ())
    return rollouts + (f", rewards {rewards}" if rewards else "")


def _total(rollout: Rollout) -> str:
    if not rollout.trained_tokens:
        return "no tokens"
    sum_ = float(rollout.rollout_logprobs.sum())
    mean = sum_ / rollout.trained_tokens
    return f"sum {sum_:.3f}, mean {mean:.3f} nats, under the rollout policy"


def _versions(versions: np.ndarray) -> str:
    """Runs of equal versions: "3 (tokens 0-5), 4 (tokens 6-9)"."""
    starts = np.flatnonzero(np.r_[True, versions[1:] != versions[:-1]]) if len(versions) else []
    ends = [*(int(s) - 1 for s in starts[1:]), len(versions) - 1]
    return ", ".join(f"{versions[s]} (tokens {s}-{e})" for s, e in zip(starts, ends, strict=False)) or "none"


def _tokens(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    lines, line = [], ""
    columns = (rollout.response_ids.tolist(), rollout.rollout_logprobs.tolist(), rollout.trained.tolist())
    for token, logprob, sampled in zip(*columns, strict=True):
        cell = f"{tokenizer.decode([token])!r} {f'{logprob:.3f}' if sampled else '(given)'}"
        if line and len(line) + 2 + len(cell) > _LINE:
            lines.append(line)
            line = ""
        line = f"{line}  {cell}" if line else cell
    return [*lines, line] if line else lines
