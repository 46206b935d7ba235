"""/v1/responses: OpenAI's other form. A request becomes one for a chat completion, and its answer a list of items.

Items of the policy that follow one another (thinking, text, calls) are one message of the conversation. Nothing is kept
here: a client sends the whole input each time, and `previous_response_id` is refused.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pipeline.environments.endpoint.chat_answer import logprob_entries
from pipeline.environments.endpoint.chat_request import ChatRequest, Part, read_body
from pipeline.environments.endpoint.refusals import Refusal, openai_form
from pipeline.environments.endpoint.served_conversation import Spoken
from pipeline.environments.endpoint.turn_stream import Delta

_TAGS = ("message", "function_call", "function_call_output", "reasoning")


class ItemText(Part):
    """annotations, logprobs: of answers, that clients send back."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = None
    logprobs: Any = None


class _Item(Part):
    id: Any = None
    status: Any = None


class MessageItem(_Item):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ItemText]


class CallItem(_Item):
    """A call of the policy."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(_Item):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ItemText]


class ReasoningText(Part):
    """A piece of it."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Item):
    """Thinking of the policy."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: None = None


def _tag(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if kind in _TAGS else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_tag),
]


class FunctionTool(Part):
    """A tool that the policy may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Part):
    """Free text, the only one."""

    type: Literal["text"]


class TextOptions(Part):
    """Of the answer's text."""

    format: TextFormat | None = None
    verbosity: None = None


class Reasoning(Part):
    """Of a provider's models; nothing can be set."""

    effort: None = None
    summary: None = None


class ResponsesRequest(Part):
    """Fields of the form that have a meaning here."""

    model: str
    input: str | list[Item] = Field(min_length=1)
    instructions: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Literal[0] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    service_tier: Any = None
    store: Any = None
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def chat(self) -> ChatRequest:
        """As a request for a chat completion."""
        same = ("model", "tool_choice", "stream", "temperature", "top_p")
        fields = {name: getattr(self, name) for name in same if getattr(self, name) is not None}
        if self.tools is not None:
            fields["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude_unset=True, exclude={"type"})}
                for tool in self.tools
            ]
        messages = list(self._messages())
        if not messages:
            raise Refusal(400, "input has no message", code="invalid_value", param="input")
        logprobs = "message.output_text.logprobs" in (self.include or ())
        return ChatRequest.read(
            fields | {"messages": messages, "max_completion_tokens": self.max_output_tokens, "logprobs": logprobs}
        )

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        said: dict[str, Any] | None = None
        for item in self.input:
            if isinstance(item, OutputItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
                if said is not None:
                    yield said
                said = None
                if isinstance(item, OutputItem):
                    yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
                else:
                    yield {"role": item.role, "content": _text(item.content)}
                continue
            said = said or {"role": "assistant", "content": ""}
            if isinstance(item, MessageItem):
                said["content"] += _text(item.content)
            elif isinstance(item, CallItem):
                function = {"name": item.name, "arguments": item.arguments}
                said.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
            else:
                thought = "".join(part.text for part in item.content or item.summary)
                said["reasoning_content"] = said.get("reasoning_content", "") + thought
        if said is not None:
            yield said


def _text(content: str | Sequence[ItemText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ResponsesAnswer:
    """See Answer."""

    form = staticmethod(openai_form)

    def __init__(self, body: Any):
        self._asked = read_body(ResponsesRequest, body, _TAGS)
        self.request = self._asked.chat()
        self._id, self._made = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._begun = False
        self._events = 0

    def whole(self, spoken: Spoken) -> dict[str, Any]:
        if spoken.said.thinking is not None:
            self._items.append(_thinking(spoken.said.thinking))
        if spoken.said.content or not spoken.calls:
            entries = logprob_entries(list(zip(spoken.tokens, spoken.logprobs, strict=True)))
            self._items.append(_message(spoken.said.content, entries if self.request.logprobs else []))
        self._items += [_call(*call) for call in spoken.calls]
        return self._response(spoken)

    def delta(self, delta: Delta) -> bytes:
        out = b""
        if not self._begun:
            self._begun = True
            for kind in ("created", "in_progress"):
                out += self._event(f"response.{kind}", response=self._response())
        if delta.thinking:
            out += self._begin("reasoning", _thinking(""))
            out += self._more("reasoning_text", delta.thinking, content_index=0)
        if delta.content:
            entries = logprob_entries(delta.tokens) if self.request.logprobs else []
            out += self._begin("message", _message("", []))
            self._items[-1]["content"][0]["logprobs"] += entries
            out += self._more("output_text", delta.content, content_index=0, logprobs=entries)
        for part in delta.calls:
            if part.call_id is not None and part.function is not None:
                out += self._begin(part.call_id, _call(part.call_id, part.function, ""))
            if part.arguments:
                out += self._more("function_call_arguments", part.arguments)
        return out

    def end(self, spoken: Spoken) -> bytes:
        out = b"" if self._items else self._begin("message", _message("", []))
        response = self._response(spoken)
        return out + self._close() + self._event(f"response.{response['status']}", response=response)

    def broken(self, refusal: Refusal) -> bytes:
        return self._event("error", code=refusal.code, message=str(refusal), param=refusal.param)

    def _begin(self, kind: str, item: dict[str, Any]) -> bytes:
        """An item of its own, where the last one is another."""
        if self._items and kind in (self._items[-1]["type"], self._items[-1].get("call_id")):
            return b""
        out = self._close()
        self._items.append(item)
        out += self._event("response.output_item.added", output_index=len(self._items) - 1, item=_open(item))
        if item["type"] == "message":
            out += self._of_item("response.content_part.added", content_index=0, part=item["content"][0])
        return out

    def _more(self, kind: str, text: str, **fields: Any) -> bytes:
        item = self._items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text
        return self._of_item(f"response.{kind}.delta", delta=text, **fields)

    def _close(self) -> bytes:
        """The last item has ended."""
        if not self._items:
            return b""
        item, out = self._items[-1], b""
        if item["type"] == "function_call":
            out += self._of_item(
                "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
            )
        elif item["type"] == "reasoning":
            out += self._of_item("response.reasoning_text.done", content_index=0, text=item["content"][0]["text"])
        else:
            part = item["content"][0]
            words = {"text": part["text"], "logprobs": part["logprobs"]}
            out += self._of_item("response.output_text.done", content_index=0, **words)
            out += self._of_item("response.content_part.done", content_index=0, part=part)
        return out + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()

    def _response(self, spoken: Spoken | None = None) -> dict[str, Any]:
        """spoken: None while it is sampled."""
        asked, cut = self._asked, spoken is not None and spoken.finish_reason == "length"
        head = {
            "id": self._id, "object": "response", "created_at": self._made, "model": asked.model, "error": None,
            "instructions": asked.instructions, "metadata": asked.metadata or {}, "parallel_tool_calls": True,
            "tool_choice": asked.tool_choice or "auto", "temperature": asked.temperature, "top_p": asked.top_p,
            "tools": [tool.model_dump() for tool in asked.tools or ()], "truncation": "disabled",
            "text": {"format": {"type": "text"}}, "max_output_tokens": asked.max_output_tokens,
        }  # fmt: skip
        if spoken is None:
            return head | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        before, own = spoken.prompt_tokens, spoken.completion_tokens
        usage = {
            "input_tokens": before, "output_tokens": own, "total_tokens": before + own,
            "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
        return head | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": usage,
        }


def _thinking(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": _name("rs"), "summary": [], "content": content, "status": "completed"}


def _message(text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": list(entries)}]
    return {"type": "message", "id": _name("msg"), "role": "assistant", "content": content, "status": "completed"}


def _call(call_id: str, function: str, arguments: str) -> dict[str, Any]:
    named = {"call_id": call_id, "name": function, "arguments": arguments}
    return {"type": "function_call", "id": _name("fc"), **named, "status": "completed"}


def _open(item: dict[str, Any]) -> dict[str, Any]:
    """As it is when it begins."""
    return item | {"status": "in_progress"} | ({} if item["type"] == "function_call" else {"content": []})


def _name(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
