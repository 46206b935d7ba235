"""What a client is told when it gets no answer."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """status: of HTTP. param: the field that is meant. code: for programs."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def openai_form(refusal: Refusal) -> dict[str, Any]:
    """The body, as OpenAI has it."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    if refusal.status == 401:
        kind = "authentication_error"
    error = {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}
    return {"error": error}


_ANTHROPIC = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}


def anthropic_form(refusal: Refusal) -> dict[str, Any]:
    """The body, as Anthropic has it, which names neither field nor code."""
    kind = "api_error" if refusal.status >= 500 else _ANTHROPIC.get(refusal.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(refusal)}}
