"""A turn in OpenAI's form: whole, or as the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from pipeline.environments.endpoint.chat_request import ChatRequest
from pipeline.environments.endpoint.served_conversation import Spoken


class ChatAnswer:
    """Of one request."""

    def __init__(self, spoken: Spoken, request: ChatRequest):
        self.spoken, self.request = spoken, request
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content, "refusal": None}
        if self.spoken.said.thinking is not None:
            message["reasoning_content"] = self.spoken.said.thinking
        if self.spoken.calls:
            message["tool_calls"] = self._calls()
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(),
            "finish_reason": self.spoken.finish_reason,
        }
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def events(self) -> Iterator[bytes]:
        """Server-sent events, the last one included. Log-probs come with the content."""
        spoken = self.spoken
        yield self._event({"role": "assistant", "content": "", "refusal": None})
        if spoken.said.thinking is not None:
            yield self._event({"reasoning_content": spoken.said.thinking})
        if spoken.said.content or self.request.logprobs:
            yield self._event({"content": spoken.said.content}, logprobs=self._logprobs())
        for index, call in enumerate(self._calls()):
            named = call | {"function": {"name": call["function"]["name"], "arguments": ""}}
            yield self._event({"tool_calls": [{"index": index} | named]})
            arguments = {"arguments": call["function"]["arguments"]}
            yield self._event({"tool_calls": [{"index": index, "function": arguments}]})
        yield self._event({}, finish_reason=spoken.finish_reason)
        if self._counts_tokens:
            yield _line(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    @property
    def _counts_tokens(self) -> bool:
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    @property
    def _content(self) -> str | None:
        content = self.spoken.said.content
        return None if self.spoken.calls and not content else content

    def _calls(self) -> list[dict[str, Any]]:
        return [
            {"id": name_of_call, "type": "function", "function": {"name": function, "arguments": arguments}}
            for name_of_call, function, arguments in self.spoken.calls
        ]

    def _logprobs(self) -> dict[str, Any] | None:
        """Of every token of the turn but the stop token; bytes are null where a token is no whole character."""
        if not self.request.logprobs:
            return None
        content = [
            {
                "token": token,
                "logprob": logprob,
                "bytes": None if "\ufffd" in token else list(token.encode()),
                "top_logprobs": [],
            }
            for token, logprob in zip(self.spoken.tokens, self.spoken.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, int]:
        before, own = self.spoken.prompt_tokens, self.spoken.completion_tokens
        return {"prompt_tokens": before, "completion_tokens": own, "total_tokens": before + own}

    def _event(
        self, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        body = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return _line(body | ({"usage": None} if self._counts_tokens else {}))


def _line(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
