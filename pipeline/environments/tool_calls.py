"""Tools that a turn called, and what they answered, for people who read a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Call = tuple[str, str, str]
"""Name, arguments, result."""


def calls_of(turn: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> tuple[Call, ...]:
    """Of a turn, as a message; answers: the tools' messages behind it, in order.

    Where the turn names its calls (`tool_calls`), an answer belongs to one by its `tool_call_id`, else by its place.
    Where it does not, its text is what each answer was given to.
    """
    named = turn.get("tool_calls") or []
    if not named:
        return tuple((str(a.get("name") or "tool"), str(turn["content"]), str(a["content"])) for a in answers)
    by_id = {answer["tool_call_id"]: answer for answer in answers if "tool_call_id" in answer}
    by_place = dict(enumerate(answers))
    out: list[Call] = []
    for place, call in enumerate(named):
        answer = by_id.get(call.get("id"), {}) if by_id else by_place.get(place, {})
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        out.append((call["function"]["name"], text, str(answer.get("content", ""))))
    return tuple(out)
