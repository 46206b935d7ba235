"""reasoning-gym's own verdict on an answer: each of its tasks has a `score_answer`, from 0 to 1."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import numpy as np

from pipeline.rewards.registry import register_reward
from pipeline.types import FinishReason, Prompt


@register_reward("reasoning_gym")
def reasoning_gym_score(
    prompt: Prompt, response_text: str, response_ids: np.ndarray, finish_reason: FinishReason
) -> float:
    """What the task's own `score_answer` gives, many of them parts of 1 for parts of an answer; 0.0 for an answer that
    was cut off. The answer is what stands in the last <answer> tag, or the whole response where there is none.

    Raises KeyError for a prompt of another source, ValueError where reasoning-gym makes another question by now.
    """
    if finish_reason != "stop":
        return 0.0
    told = prompt.metadata
    made = told["reasoning_gym"]
    entries = _entries(told["task"], made["seed"], made["size"], json.dumps(made["parameters"]))
    entry = entries[made["index"]]
    if entry["question"] != told["question"]:
        raise ValueError("this release of reasoning-gym makes another question; the run was begun with another one")
    _, tag, tagged = response_text.rpartition("<answer>")
    answer = tagged.partition("</answer>")[0] if tag else response_text
    return float(entries.score_answer(answer.strip(), entry))


@functools.lru_cache(maxsize=64)
def _entries(task: str, seed: int, size: int, parameters: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib 2.4.0, when it is compiled
        import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(parameters))
