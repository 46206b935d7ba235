"""The score that a language model gives an answer, over an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.rewards.ask import ask
from pipeline.rewards.fill import fill
from pipeline.rewards.kinds.reward_model import FOREVER_S, read_key
from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier


def load(settings: Mapping[str, Any]) -> Verifier:
    """0.0 at the lower end of the scale, 1.0 at the upper one.

    The verifier raises AskError where the judge cannot be asked, ValueError where it names no score, or one off the
    scale: that says nothing of the answer.
    """
    pattern, (low, high) = re.compile(settings["pattern"]), settings["scale"]
    url = settings["url"].rstrip("/")
    url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
    key = read_key(settings)

    def judge(question: Question) -> float:
        body = {
            "model": settings["model"],
            "messages": [{"role": "user", "content": fill(settings["template"], question)}],
            "max_tokens": settings["max_tokens"],
            "temperature": settings["temperature"],
        }
        said = _content(ask(url, body, timeout_s=FOREVER_S, key=key, proxies=settings["proxies"]))
        found = pattern.findall(said)
        if not found:
            raise ValueError(f"the judge names no score: {said[-300:]!r}")
        score = float(found[-1])
        if not min(low, high) <= score <= max(low, high):
            raise ValueError(f"the judge's score {score:g} is off the scale from {low:g} to {high:g}")
        return (score - low) / (high - low)

    return judge


def _content(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"there is no message in the judge's answer {str(answer)[:300]}") from error
    if not isinstance(content, str):
        raise ValueError(f"the judge's message is {content!r}, no text")
    return content
