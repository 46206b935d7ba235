"""What the data set of reasoning-gym that made the prompt says of the response.

The prompt's metadata is the data set's entry: `answer`, and `metadata` with its `source_dataset`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier, VerifierError


def load(settings: Mapping[str, Any]) -> Verifier:
    """A number from 0.0 to 1.0; 0.0 where the response did not end by itself or has no answer.

    The verifier raises KeyError for a prompt that no data set made. Raises VerifierError where the library is missing.
    """
    try:
        library = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise VerifierError(f"reasoning_gym needs its library: pip install reasoning-gym ({error})") from error
    tag = settings.get("tag", "answer")

    def reasoning_gym(question: Question) -> float:
        entry = question.prompt.metadata
        score = library.get_score_answer_fn(entry["metadata"]["source_dataset"])
        answer = tagged(question.response_text, tag)
        return float(score(answer, entry)) if answer is not None and question.finish_reason == "stop" else 0.0

    return reasoning_gym


def tagged(text: str, tag: str | None) -> str | None:
    """What stands in the last <tag>...</tag>, or all of it where there is no tag to look for; None for nothing."""
    if tag is None:
        return text.strip()
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[-1].strip() if found else None
