"""1 for exactly the answer, 0 for anything else."""

from __future__ import annotations

import numpy as np

from pipeline.rewards.registry import register_reward
from pipeline.types import FinishReason, Prompt


@register_reward("exact_match", quick=True)
def exact_match(prompt: Prompt, response_text: str, response_ids: np.ndarray, finish_reason: FinishReason) -> float:
    """1.0 where the response is metadata["answer"] but for white space around it, and ended by itself; else 0.0.

    Raises KeyError for a prompt without an answer.
    """
    answer = prompt.metadata["answer"]
    return float(finish_reason == "stop" and response_text.strip() == answer.strip())
