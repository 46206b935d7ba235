"""/v1/chat/completions: a turn in OpenAI's form, whole, or as the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pipeline.environments.endpoint.chat_request import ChatRequest
from pipeline.environments.endpoint.refusals import Refusal, openai_form
from pipeline.environments.endpoint.served_conversation import Spoken
from pipeline.environments.endpoint.turn_stream import CallPart, Delta


class ChatAnswer:
    """See Answer."""

    form = staticmethod(openai_form)

    def __init__(self, body: Any):
        self.request = ChatRequest.read(body)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.request.model,
        }
        self._begun = False

    def whole(self, spoken: Spoken) -> dict[str, Any]:
        said = spoken.said
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if spoken.calls:
            message["content"] = said.content or None
            message["tool_calls"] = [_call(call_id, name, arguments) for call_id, name, arguments in spoken.calls]
        if said.thinking is not None:
            message["reasoning_content"] = said.thinking
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(list(zip(spoken.tokens, spoken.logprobs, strict=True))),
            "finish_reason": spoken.finish_reason,
        }
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": _usage(spoken)}

    def delta(self, delta: Delta) -> bytes:
        """Log-probs come with the first piece that their tokens added to, or with the last one."""
        out = b"" if self._begun else self._event({"role": "assistant", "content": "", "refusal": None})
        self._begun = True
        told = {"reasoning_content": delta.thinking, "content": delta.content}
        changed: dict[str, Any] = {name: text for name, text in told.items() if text}
        if delta.calls:
            changed["tool_calls"] = [_part(part) for part in delta.calls]
        if changed or (delta.tokens and self.request.logprobs):
            out += self._event(changed or {"content": ""}, logprobs=self._logprobs(delta.tokens))
        return out

    def end(self, spoken: Spoken) -> bytes:
        out = self._event({}, finish_reason=spoken.finish_reason)
        if self._counts_tokens:
            out += _line(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(spoken)})
        return out + b"data: [DONE]\n\n"

    def broken(self, refusal: Refusal) -> bytes:
        return _line(self.form(refusal))

    @property
    def _counts_tokens(self) -> bool:
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    def _logprobs(self, tokens: Sequence[tuple[str, float]]) -> dict[str, Any] | None:
        """None where the client asked for none."""
        return {"content": logprob_entries(tokens), "refusal": None} if self.request.logprobs else None

    def _event(
        self, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        body = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return _line(body | ({"usage": None} if self._counts_tokens else {}))


def logprob_entries(tokens: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Of (text, log-prob) of each token but the stop token; bytes are null where a token is no whole character."""
    return [
        {
            "token": token,
            "logprob": logprob,
            "bytes": None if "\ufffd" in token else list(token.encode()),
            "top_logprobs": [],
        }
        for token, logprob in tokens
    ]


def _call(call_id: str, function: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": function, "arguments": arguments}}


def _part(part: CallPart) -> dict[str, Any]:
    if part.call_id is None or part.function is None:
        return {"index": part.place, "function": {"arguments": part.arguments}}
    return {"index": part.place, **_call(part.call_id, part.function, part.arguments)}


def _usage(spoken: Spoken) -> dict[str, int]:
    before, own = spoken.prompt_tokens, spoken.completion_tokens
    return {"prompt_tokens": before, "completion_tokens": own, "total_tokens": before + own}


def _line(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
