"""1 where a pattern is found in the response: a format, or an answer in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier


def load(settings: Mapping[str, Any]) -> Verifier:
    """1.0 where it is found, and its group `answer`, if it has one, is the prompt's answer; else 0.0.

    A pattern that goes back and forth without end is stopped by the grader's time limit.
    """
    pattern, key = re.compile(settings["pattern"]), settings.get("answer", "answer")
    checks_answer = "answer" in pattern.groupindex

    def regex(question: Question) -> float:
        if not checks_answer:
            return float(pattern.search(question.response_text) is not None)
        right = str(question.prompt.metadata[key]).strip()
        given = [found["answer"] for found in pattern.finditer(question.response_text)]
        return float(bool(given) and (given[-1] or "").strip() == right)

    return regex
