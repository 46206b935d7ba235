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
    Where it does not, its text is what each answer was given to. An environment may have set anything there: what is
    no call of OpenAI's form, or the function alone, as templates read it too, is shown as it is.
    """
    named = turn.get("tool_calls") or []
    if not named:
        said = str(turn.get("content") or "")
        return tuple((str(a.get("name") or "tool"), said, str(a.get("content") or "")) for a in answers)
    by_id = {str(answer["tool_call_id"]): answer for answer in answers if "tool_call_id" in answer}
    by_place = dict(enumerate(answers))
    out: list[Call] = []
    for place, call in enumerate(named if isinstance(named, Sequence) and not isinstance(named, str) else [named]):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        of = str(call.get("id")) if isinstance(call, Mapping) else ""
        answer = by_id.get(of, {}) if by_id else by_place.get(place, {})
        result = str(answer.get("content") or "")
        if isinstance(function, Mapping):
            out.append((str(function.get("name") or "tool"), _text(function.get("arguments", "")), result))
        else:
            out.append(("tool", _text(function), result))
    return tuple(out)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # no JSON
        return str(value)
