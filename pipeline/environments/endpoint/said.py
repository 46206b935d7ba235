"""Messages of clients against messages of a conversation.

A client sends the whole conversation each time. It goes on where the client's messages begin with all that was said:
then only the rest is new. What was said is compared by meaning: no content is as good as an empty one, a content in
parts as good as their text, and arguments of a tool are compared as JSON. Thinking is not compared: many clients leave
it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.environments.endpoint.chat_request import ChatMessage
from pipeline.environments.templates import HistoryError, Message, TemplateWriter
from pipeline.environments.turn_parser import Said


def to_message(sent: ChatMessage, *, as_text: bool) -> Message:
    """As the chat template takes it. as_text: arguments of tools stay JSON, see `wants_text`."""
    content = sent.content or ""
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    message: Message = {"role": sent.role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(sent, name)) is not None:
            message[name] = value
    if sent.tool_calls:
        message["tool_calls"] = [
            tool_call(call.id, call.function.name, call.function.arguments, as_text=as_text) for call in sent.tool_calls
        ]
    return message


def tool_call(name_of_call: str, function: str, arguments: str, *, as_text: bool) -> dict[str, Any]:
    """Of a message, as the chat template takes it. arguments: JSON; what is none stays a text."""
    read: Any = arguments
    if not as_text:
        try:
            loaded = json.loads(arguments)
        except (ValueError, RecursionError):
            loaded = arguments
        read = loaded if isinstance(loaded, dict) else arguments
    return {"id": name_of_call, "type": "function", "function": {"name": function, "arguments": read}}


def set_parts(message: Message, said: Said, calls: Sequence[tuple[str, str, str]], *, as_text: bool) -> None:
    """What a turn was made of stands in its message, by the names that templates read. calls: (id, function, arguments
    in JSON). as_text: see `wants_text`."""
    message["content"] = said.content
    if said.thinking is not None:
        message["reasoning_content"] = said.thinking
    if calls:
        message["tool_calls"] = [tool_call(*call, as_text=as_text) for call in calls]


def rest(said: Sequence[Message], sent: Sequence[Message]) -> list[Message] | None:
    """Messages of `sent` behind all that was said; None where it does not begin with that."""
    if len(sent) < len(said) or any(_meaning(a) != _meaning(b) for a, b in zip(said, sent, strict=False)):
        return None
    return list(sent[len(said) :])


def same(a: Any, b: Any) -> bool:
    """Of two JSON values."""
    return _canonical(a) == _canonical(b)


def wants_text(writer: TemplateWriter) -> bool:
    """Whether the chat template takes arguments of a tool as JSON text; most take a mapping."""
    call = tool_call("f00000000", "look", '{"x": 1}', as_text=False)
    asked: list[Message] = [{"role": "user", "content": "question"}]
    try:
        writer.render([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except HistoryError:
        return True
    return False


def _meaning(message: Message) -> tuple[Any, ...]:
    calls = [
        (call.get("id"), call["function"]["name"], _arguments(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return message["role"], message.get("content") or "", calls, message.get("tool_call_id"), message.get("name")


def _arguments(given: str | Mapping[str, Any]) -> str:
    if not isinstance(given, str):
        return _canonical(given)
    try:
        return _canonical(json.loads(given))
    except (ValueError, RecursionError):
        return given


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
