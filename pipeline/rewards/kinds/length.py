"""0 for short answers, falling to -1 for long ones (DAPO, arXiv 2503.14476, equation 13: L_max = full_tokens, L_cache =
full_tokens - free_tokens). Tokens are those that the policy sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier


def load(settings: Mapping[str, Any]) -> Verifier:
    """A number from -1.0 to 0.0."""
    free, full = settings["free_tokens"], settings["full_tokens"]

    def length(question: Question) -> float:
        return -min(1.0, max(0.0, (question.length - free) / (full - free)))

    return length
