"""/v1/messages: Anthropic's form. A request becomes one for a chat completion, and its answer a list of blocks."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.environments.endpoint.chat_request import ChatRequest, Part, read_body
from pipeline.environments.endpoint.refusals import Refusal, anthropic_form
from pipeline.environments.endpoint.served_conversation import Spoken
from pipeline.environments.endpoint.turn_stream import Delta

_TAGS = ("text", "tool_use", "tool_result", "thinking")
_STOPS = {"tool_calls": "tool_use", "stop": "end_turn", "length": "max_tokens"}


class _Block(Part):
    cache_control: Any = None


class TextBlock(_Block):
    """A piece of a content."""

    type: Literal["text"]
    text: str
    citations: None = None


class UseBlock(_Block):
    """A call of the policy."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: None = None
    toolset_name: None = None


class ResultBlock(_Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    toolset_name: None = None


class ThinkingBlock(Part):
    """Thinking of the policy."""

    type: Literal["thinking"]
    thinking: str
    signature: Any = None


Block = Annotated[TextBlock | UseBlock | ResultBlock | ThinkingBlock, Field(discriminator="type")]


class SaidMessage(Part):
    """What somebody said."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(Part):
    """A tool that the policy may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: Any = None
    eager_input_streaming: Any = None


class ToolChoice(Part):
    """auto, or none."""

    type: Literal["auto", "none"]
    disable_parallel_tool_use: Literal[False] | None = None


class NoThinking(Part):
    """Thinking is the chat template's."""

    type: Literal["disabled"]


class MessagesRequest(Part):
    """Fields of the form that have a meaning here."""

    model: str
    max_tokens: int = Field(ge=1)
    messages: list[SaidMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = Field(None, max_length=0)
    thinking: NoThinking | None = None
    cache_control: Any = None
    metadata: Any = None
    service_tier: Any = None

    def chat(self) -> ChatRequest:
        """As a request for a chat completion."""
        same = ("model", "stream", "temperature", "top_p", "max_tokens")
        fields = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        if self.tools is not None:
            fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in self.tools]
        if self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice.type
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        said = [message for one in self.messages for message in _messages(one)]
        return ChatRequest.read(fields | {"messages": system + said})


def _function(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": tool.input_schema}


def _messages(said: SaidMessage) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says with them."""
    blocks = said.content if not isinstance(said.content, str) else []
    for block in blocks:
        if isinstance(block, ResultBlock):
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}
    text = said.content if isinstance(said.content, str) else _text([b for b in blocks if isinstance(b, TextBlock)])
    if said.role == "user":
        if text or not blocks:
            yield {"role": "user", "content": text}
        return
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
        message["reasoning_content"] = "".join(thoughts)
    if calls := [block for block in blocks if isinstance(block, UseBlock)]:
        message["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": json.dumps(call.input)}} for call in calls
        ]
    yield message


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


class MessagesAnswer:
    """See Answer."""

    form = staticmethod(anthropic_form)

    def __init__(self, body: Any):
        asked = read_body(MessagesRequest, body, _TAGS)
        self.request = asked.chat()
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": asked.model,
            "stop_sequence": None,
        }  # fmt: skip
        self._begun = False
        self._block, self._kind = -1, ""

    def whole(self, spoken: Spoken) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        if spoken.said.thinking is not None:
            blocks.append(_block("thinking") | {"thinking": spoken.said.thinking})
        if spoken.said.content:
            blocks.append(_block("text") | {"text": spoken.said.content})
        for call_id, name, arguments in spoken.calls:
            blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": _input(arguments)})
        usage = {"input_tokens": spoken.prompt_tokens, "output_tokens": spoken.completion_tokens}
        return self._head | {"content": blocks, "stop_reason": _STOPS[spoken.finish_reason], "usage": usage}

    def delta(self, delta: Delta) -> bytes:
        out = b""
        if not self._begun:
            self._begun = True
            usage = {"input_tokens": delta.prompt_tokens, "output_tokens": 0}
            message = self._head | {"content": [], "stop_reason": None, "usage": usage}
            out += _event("message_start", message=message)
        if delta.thinking:
            out += self._begin("thinking", _block("thinking"))
            out += self._more("thinking_delta", thinking=delta.thinking)
        if delta.content:
            out += self._begin("text", _block("text")) + self._more("text_delta", text=delta.content)
        for part in delta.calls:
            if part.call_id is not None:
                block = {"type": "tool_use", "id": part.call_id, "name": part.function, "input": {}}
                out += self._begin(part.call_id, block)
            if part.arguments:
                out += self._more("input_json_delta", partial_json=part.arguments)
        return out

    def end(self, spoken: Spoken) -> bytes:
        stopped = {"stop_reason": _STOPS[spoken.finish_reason], "stop_sequence": None}
        usage = {"output_tokens": spoken.completion_tokens}
        return self._close() + _event("message_delta", delta=stopped, usage=usage) + _event("message_stop")

    def broken(self, refusal: Refusal) -> bytes:
        return _event("error", error=anthropic_form(refusal)["error"])

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        """A block of its own, where the last one is another. kind: of text or thinking; else the id of a call."""
        if kind == self._kind:
            return b""
        out = self._close()
        self._block, self._kind = self._block + 1, kind
        return out + _event("content_block_start", index=self._block, content_block=block)

    def _more(self, kind: str, **fields: str) -> bytes:
        return _event("content_block_delta", index=self._block, delta={"type": kind, **fields})

    def _close(self) -> bytes:
        return _event("content_block_stop", index=self._block) if self._kind else b""


def _block(kind: Literal["text", "thinking"]) -> dict[str, Any]:
    """Without anything in it. Nobody signs thinking here."""
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})


def _input(arguments: str) -> Any:
    """Of a call, from JSON; {} where the turn was cut inside of it."""
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
