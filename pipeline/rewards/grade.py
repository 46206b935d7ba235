"""Rewards of sampled groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.rewards.registry import RewardError, RewardFunction
from pipeline.types import Episode, Group, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def grade(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, reward: RewardFunction) -> list[Group]:
    """The same groups, every episode with its reward.

    Raises RewardError, naming the prompt, where the verifier raises or returns anything but a finite number.
    """

    def graded(prompt: Prompt, episode: Episode) -> Episode:
        return dataclasses.replace(episode, reward=_reward(prompt, episode.last, tokenizer, reward))

    return [
        dataclasses.replace(group, episodes=tuple(graded(group.prompt, episode) for episode in group.episodes))
        for group in groups
    ]


def response_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    """The response without the stop token that ended it.

    Other special tokens stay: left out, "12<|user|>34" would read as the right answer 1234.
    """
    ids = rollout.response_ids[:-1] if rollout.finish_reason == "stop" else rollout.response_ids
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def _reward(prompt: Prompt, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, reward: RewardFunction) -> float:
    text = response_text(rollout, tokenizer)
    where = f"prompt {prompt.index} ({prompt.text[:200]!r}), response {text[:200]!r}"
    try:
        value = reward(prompt, text, rollout.response_ids, rollout.finish_reason)
    # A verifier may be a user's own and raise anything; the run stops with the prompt's name in front.
    except Exception as error:
        raise RewardError(f"the verifier failed on {where}: {type(error).__name__}: {error}") from error
    if not isinstance(value, bool | int | float | np.bool_ | np.number) or not math.isfinite(value):
        raise RewardError(f"the verifier returned {value!r}, which is no finite number, on {where}")
    return float(value)
