"""What a response answers, as a text that equal answers share: the votes of majority@k."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from pipeline.config.rewards import RewardConfig
from pipeline.rewards.kinds.math_verify import last_box, plain_digits
from pipeline.rewards.kinds.multiple_choice import chosen
from pipeline.rewards.kinds.number import find_number
from pipeline.rewards.kinds.reasoning_gym import tagged

Given = Callable[[str], str | None]
"""From a response to what it answers; None: nothing."""


def given_by(rewards: Sequence[RewardConfig]) -> Given | None:
    """As the first of the verifiers reads a response that compares an answer; None where none of them does."""
    for reward in rewards:
        settings: dict[str, Any] = reward.model_dump()
        match settings["kind"]:
            case "exact_match":
                return lambda text: text.strip() or None
            case "number":
                return lambda text, after=settings["after"]: _number(text, after)
            case "multiple_choice":
                return lambda text, choices=settings["choices"]: chosen(text, choices)
            case "math_verify":
                return lambda text, boxed=settings["boxed"]: _expression(text, boxed)
            case "reasoning_gym":
                return lambda text, tag=settings["tag"]: tagged(text, tag) or None
    return None


def _number(text: str, after: str | None) -> str | None:
    found = find_number(text, after, must_announce=after is not None)
    if found is None:
        return None
    try:
        top, bottom = (Fraction(part) if "e" not in part.lower() else None for part in found)
        return "/".join(found) if top is None or bottom is None else str(top / bottom)
    except ZeroDivisionError:
        return None


def _expression(text: str, boxed: bool) -> str | None:
    """LaTeX as it is written, without what changes nothing; two ways to write a value are two answers."""
    content = last_box(text)
    if content is None:
        return None if boxed else _number(text, None)
    plain = re.sub(r"\\[dt]frac", r"\\frac", plain_digits(content)).replace("$", "")
    plain = re.sub(r"\\(left|right)(?![a-zA-Z])|\\[,;:! ]|\s", "", plain).rstrip(".")
    return _number(plain, None) if re.fullmatch(r"[-+]?[\d,.]+", plain) else plain or None
