"""reasoning-gym's own verdict on an answer: each of its tasks has a `score_answer`, from 0 to 1."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import SamerouteError
from pipeline.rewards.registry import register_reward
from pipeline.types import FinishReason, Prompt

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


class GymError(SamerouteError, ValueError):
    """reasoning-gym cannot make a set as it was asked to."""


@register_reward("reasoning_gym")
def reasoning_gym_score(
    prompt: Prompt, response_text: str, response_ids: np.ndarray, finish_reason: FinishReason
) -> float:
    """What the task's own `score_answer` gives, many of them parts of 1 for parts of an answer; 0.0 for an answer that
    was cut off. The answer is what stands in the last <answer> tag, or the whole response where there is none.

    Raises KeyError for a prompt of another source, ValueError where reasoning-gym makes another question by now.
    """
    from reasoning_gym.utils import extract_answer

    if finish_reason != "stop":
        return 0.0
    made = prompt.metadata["reasoning_gym"]
    entry_set = gym_set(prompt.metadata["task"], made["seed"], made["size"], made["parameters"])
    entry = _entry(entry_set, made["index"])
    if entry["question"] != prompt.metadata["question"]:
        raise ValueError("this release of reasoning-gym makes another question; the run was begun with another one")
    answer = extract_answer(response_text) if "<answer>" in response_text else response_text.strip()
    return float(entry_set.score_answer(answer, entry))


def gym_set(task: str, seed: int, size: int, parameters: Mapping[str, Any]) -> ProceduralDataset:
    """A set of entries. Raises GymError: no such task, or parameters that it refuses."""
    return _set(task, seed, size, json.dumps(parameters, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _set(task: str, seed: int, size: int, parameters: str) -> ProceduralDataset:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise GymError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    given = json.loads(parameters)
    known = DATASETS[task][1].__dataclass_fields__
    if unknown := sorted(given.keys() - known):
        there = ", ".join(sorted(known.keys() - {"seed", "size"}))
        raise GymError(f"the task {task} has no parameter {unknown[0]!r}; it has {there}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **given)
    except (AssertionError, ValueError, TypeError) as error:
        raise GymError(f"the task {task} refuses {given}: {error}") from error


@functools.lru_cache(maxsize=1024)
def _entry(entry_set: ProceduralDataset, index: int) -> dict[str, Any]:
    return entry_set[index]
