"""The forms in which clients speak, by their paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from pipeline.environments.endpoint.chat_answer import ChatAnswer
from pipeline.environments.endpoint.chat_request import ChatRequest
from pipeline.environments.endpoint.messages import MessagesAnswer
from pipeline.environments.endpoint.refusals import Refusal
from pipeline.environments.endpoint.responses import ResponsesAnswer
from pipeline.environments.endpoint.served_conversation import Spoken
from pipeline.environments.endpoint.turn_stream import Delta


class Answer(Protocol):
    """To one request, whose body it is made of: raises Refusal for one that cannot be answered.

    request: as a request for a chat completion, which all forms are.
    """

    request: ChatRequest

    def __init__(self, body: Any): ...

    @staticmethod
    def form(refusal: Refusal) -> dict[str, Any]:
        """The body of an answer that is a refusal."""
        ...

    def whole(self, spoken: Spoken) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """Server-sent events, those of the beginning before the first; b"" where there is nothing to tell."""
        ...

    def end(self, spoken: Spoken) -> bytes:
        """The last events."""
        ...

    def broken(self, refusal: Refusal) -> bytes:
        """The last event of a stream that does not come to its end."""
        ...


FORMS: Final[Mapping[str, type[Answer]]] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/responses": ResponsesAnswer,
    "/v1/messages": MessagesAnswer,
}
