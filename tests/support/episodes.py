"""Groups, batches and step results made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.step import Batch, PolicyTokens, StepResult
from pipeline.types import Episode, Group, Prompt, Rollout


def graded_group(prompt: Prompt, rollouts: Sequence[Rollout], rewards: Sequence[float] | np.ndarray) -> Group:
    """A group of single-turn episodes with these rewards."""
    pairs = zip(rollouts, rewards, strict=True)
    return Group(prompt, tuple(Episode((rollout,), float(reward)) for rollout, reward in pairs))


def plain_rollout(ids: Sequence[int], logprobs: np.ndarray, version: int = 0, **changes) -> Rollout:
    """A rollout after a prompt of one token, without routes."""
    fields = {
        "prompt_ids": np.zeros(1, np.int32),
        "response_ids": np.asarray(ids, np.int32),
        "rollout_logprobs": np.asarray(logprobs, np.float32),
        "routes": None,
        "weight_versions": np.full(len(ids), version, np.int32),
        "finish_reason": "stop",
    }
    return Rollout(**(fields | changes))


def conversation(tokenizer, parts: Sequence[Sequence[str]], version: int = 0, **changes) -> Episode:
    """An episode of a rollout for each list of texts: what the policy said, what it was told, what it said, ..."""
    rollouts = []
    for texts in parts:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        trained = np.concatenate([np.full(len(own), i % 2 == 0) for i, own in enumerate(ids)])
        logprobs = np.where(trained, -np.linspace(0.05, 3.0, len(trained)), 0)
        versions = np.where(trained, version, -1).astype(np.int32)
        rollouts.append(plain_rollout(np.concatenate(ids), logprobs, trained=trained, weight_versions=versions))
    return Episode(tuple(rollouts), **changes)


def step_result(
    step: int,
    groups: Sequence[Group],
    proximal: Sequence[np.ndarray],
    current: Sequence[np.ndarray],
    entropy: Sequence[np.ndarray],
    advantages: Sequence[np.ndarray | float],
    routing: np.ndarray,
    metrics: dict[str, float] | None = None,
) -> StepResult:
    """What `Loop.step` gives back."""
    return StepResult(
        metrics=metrics or {"step": step},
        batch=Batch(step, step, tuple(groups)),
        proximal=PolicyTokens(list(proximal), list(entropy), routing),
        current_logprobs=list(current),
        advantages=list(advantages),
    )
