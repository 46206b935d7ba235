"""What a client is told when it gets no answer, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """status: of HTTP. kind: `type` of the form. param: the field that is meant. code: for programs."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def kind(self) -> str:
        if self.status >= 500:
            return "server_error"
        return "authentication_error" if self.status == 401 else "invalid_request_error"

    def form(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}
