"""The number that a server gives an answer, over HTTP with JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.ask import ask
from pipeline.rewards.fill import fill
from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier, VerifierError

FOREVER_S = 86400.0
"""The grader's time limit is the one that counts."""


def load(settings: Mapping[str, Any]) -> Verifier:
    """The number at `reward_at` of what comes back.

    The verifier raises AskError where the server cannot be asked, KeyError for a name in the body that the prompt's
    metadata lacks, ValueError where there is no number.
    """
    url, body, path = settings["url"], settings["body"], settings["reward_at"].split(".")
    key = read_key(settings)

    def reward_model(question: Question) -> float:
        answer = ask(url, fill(body, question), timeout_s=FOREVER_S, key=key, proxies=settings["proxies"])
        return number_at(answer, path)

    return reward_model


def read_key(settings: Mapping[str, Any]) -> str | None:
    """The key of a server. Raises VerifierError where its variable is not set."""
    name = settings["key_variable"]
    if name is not None and not os.environ.get(name):
        raise VerifierError(f"key_variable: the environment has no {name}; set it, or leave the field out")
    return None if name is None else os.environ[name]


def number_at(value: Any, path: list[str]) -> float:
    """The number at a place of JSON. Raises ValueError, showing what is there."""
    here = value
    for part in path:
        try:
            here = here[int(part)] if isinstance(here, list) else here[part]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"there is no {'.'.join(path)} in the answer {str(value)[:300]}") from error
    if isinstance(here, bool) or not isinstance(here, int | float):
        raise ValueError(f"{'.'.join(path)} of the answer is {str(here)[:100]}, which is no number")
    return float(here)
