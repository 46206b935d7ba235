"""What the task of reasoning-gym that made the prompt says of the response.

The prompt's metadata is an entry of a set as the library gives it (`answer`, and `metadata` with `source_dataset`), or
how its entry is made again: `task`, `question`, and `reasoning_gym` with seed, size, index and parameters.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier, VerifierError


def load(settings: Mapping[str, Any]) -> Verifier:
    """A number from 0.0 to 1.0; 0.0 where the response did not end by itself.

    The verifier raises KeyError for a prompt that no task made, ValueError where the library makes another question by
    now. Raises VerifierError where the library is missing.
    """
    try:
        library = _library()
    except ImportError as error:
        raise VerifierError(f"reasoning_gym needs its library: pip install reasoning-gym ({error})") from error
    tag = settings.get("tag", "answer")

    def reasoning_gym(question: Question) -> float:
        told = question.prompt.metadata
        if question.finish_reason != "stop":
            return 0.0
        answer = tagged(question.response_text, tag)
        if "reasoning_gym" not in told:
            return float(library.get_score_answer_fn(told["metadata"]["source_dataset"])(answer, told))
        made = told["reasoning_gym"]
        entries = _set(told["task"], made["seed"], made["size"], json.dumps(made["parameters"]))
        entry = entries[made["index"]]
        if entry["question"] != told["question"]:
            raise ValueError("this release of reasoning-gym makes another question; the run was begun with another one")
        return float(entries.score_answer(answer, entry))

    return reasoning_gym


def tagged(text: str, tag: str | None) -> str:
    """What stands in the last <tag>...</tag>; all of it where there is none, or none to look for."""
    found = [] if tag is None else re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return (found[-1] if found else text).strip()


@functools.lru_cache(maxsize=64)
def _set(task: str, seed: int, size: int, parameters: str) -> Any:
    return _library().create_dataset(task, seed=seed, size=size, **json.loads(parameters))


def _library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib 2.4.0, when it is compiled
        return importlib.import_module("reasoning_gym")
