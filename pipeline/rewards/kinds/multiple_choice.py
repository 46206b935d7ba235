"""1 where the response chooses the answer's letter.

Where it says which, in this order: \\boxed{C}, "answer is (C)", a letter as its last word, a letter in brackets. Of
several of one kind the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier


def load(settings: Mapping[str, Any]) -> Verifier:
    """1.0 where it is, and the response ended by itself; else 0.0.

    The verifier raises KeyError for a prompt without an answer, ValueError for an answer that is none of the choices.
    """
    key, choices = settings.get("answer", "answer"), settings.get("choices", "ABCD")

    def multiple_choice(question: Question) -> float:
        right = _letter(question.prompt.metadata[key], choices)
        return float(question.finish_reason == "stop" and chosen(question.response_text, choices) == right)

    return multiple_choice


def chosen(text: str, choices: str) -> str | None:
    """The letter that a response chooses; None where it chooses none."""
    one = rf"([{choices}])"
    ways = (
        rf"\\boxed\s*\{{\s*(?:\\text\w*\s*\{{)?\s*\(?{one}\b",
        rf"(?i:\b(?:answer|choice|option)\b)\W{{0,6}}(?i:(?:is|:)\W{{0,6}})?(?i:option\W{{1,3}})?\(?{one}\b(?!['\u2019])",
        rf"\A\W*{one}\W*\Z",
        rf"\({one}\)(?=[\s.*]*\Z)",
        rf"\b{one}[\s.*)]*\Z",
        rf"\({one}\)",
    )
    for way in ways:
        if found := re.findall(way, text):
            return found[-1]
    return None


def _letter(answer: Any, choices: str) -> str:
    """The answer as a letter: "C", "(C)", or its place from 0."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    word = str(answer).strip().strip("().").upper()
    if len(word) == 1 and word in choices:
        return word
    raise ValueError(f"the answer {answer!r} is none of {', '.join(choices)}, nor a place from 0")
