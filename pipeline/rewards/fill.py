"""Texts with {prompt}, {response} and {KEY} of the prompt's metadata in them, filled in for an answer."""

from __future__ import annotations

from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.text.named import NAMED


def fill(value: Any, question: Question) -> Any:
    """The same JSON with every text filled in; braces around anything but a name stay, as does all that was filled in.

    Raises KeyError for a name that the prompt's metadata lacks.
    """
    known = question.prompt.metadata | {"prompt": question.prompt.text, "response": question.response_text}
    if isinstance(value, str):
        return NAMED.sub(lambda found: str(known[found[1]]), value)
    if isinstance(value, dict):
        return {key: fill(inner, question) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, question) for inner in value]
    return value
