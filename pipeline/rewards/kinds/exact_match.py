"""1 for exactly the answer, 0 for anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier


def load(settings: Mapping[str, Any]) -> Verifier:
    """1.0 where the response is the answer but for white space around it, and ended by itself; else 0.0.

    The verifier raises KeyError for a prompt without an answer.
    """
    key = settings.get("answer", "answer")

    def exact_match(question: Question) -> float:
        answer = str(question.prompt.metadata[key])
        return float(question.finish_reason == "stop" and question.response_text.strip() == answer.strip())

    return exact_match
