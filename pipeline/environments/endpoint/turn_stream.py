"""A turn as it is sampled: tokens become what is new for the client.

    stream.take(piece) -> Delta      # as tokens come
    stream.end()       -> Delta      # what was held back
    stream.said                      # all that was told

What was told stands: the conversation's message is what the client put together from it, so that the client's next
request goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.engine.sampling import Piece
from pipeline.environments.turn_parser import Fragment, Said, StreamParser

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class Retold(Exception):
    """What the client has been told is not what the answer will be: its server was lost, and another begins anew."""


@dataclass(frozen=True)
class CallPart:
    """Of a tool call. place: of the call in the turn. call_id, function: at its beginning, else None. arguments: more
    of them."""

    place: int
    call_id: str | None
    function: str | None
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What is new. tokens: (text, log-prob) of those that it was made of, and of those before that had added nothing.
    prompt_tokens: that stand before the turn."""

    prompt_tokens: int
    thinking: str
    content: str
    calls: tuple[CallPart, ...]
    tokens: tuple[tuple[str, float], ...]

    @property
    def empty(self) -> bool:
        return not (self.thinking or self.content or self.calls)


class TurnStream:
    """Of one turn."""

    def __init__(
        self, text_of: Callable[[Sequence[int]], str], parser: StreamParser, call_id: Callable[[int, str], str]
    ):
        """text_of: token ids. call_id: of a call, by its place in the turn and its function."""
        self._text_of, self._parser, self._call_id = text_of, parser, call_id
        self._characters = _Characters(text_of)
        self._begun: int | None = None
        self._next = 0
        self._waiting: list[tuple[str, float]] = []

    @property
    def said(self) -> Said:
        return self._parser.said

    def take(self, piece: Piece) -> Delta:
        """Raises Retold."""
        if self._begun is None:
            self._begun = self._next = piece.at
        if piece.at != self._next:
            raise Retold("the server that sampled the answer was lost, and what it had said so far with it; ask again")
        self._next += len(piece.ids)
        shown = len(piece.ids) - piece.ended
        fragments: list[Fragment] = []
        for token, logprob in zip(piece.ids[:shown], piece.logprobs[:shown], strict=True):
            self._waiting.append((self._text_of([token]), logprob))
            if text := self._characters.take(token):
                fragments.append(self._parser.take(text))
        return self._delta(fragments)

    def end(self) -> Delta:
        """Of the turn, which has ended. It has all log-probs that are left."""
        fragments = [self._parser.take(text)] if (text := self._characters.end()) else []
        return self._delta([*fragments, self._parser.end()], last=True)

    def _delta(self, fragments: Sequence[Fragment], *, last: bool = False) -> Delta:
        calls = [
            CallPart(place, None if function is None else self._call_id(place, function), function, arguments)
            for fragment in fragments
            for place, function, arguments in fragment.calls
        ]
        thinking, content = ("".join(getattr(f, part) for f in fragments) for part in ("thinking", "content"))
        tokens: tuple[tuple[str, float], ...] = ()
        if last or thinking or content or calls:
            tokens, self._waiting = tuple(self._waiting), []
        return Delta(self._begun or 0, thinking, content, tuple(calls), tokens)


class _Characters:
    """Text of tokens that come one by one; a character of several tokens comes whole.

    A token's text may depend on those before it (a space at the beginning), so the last ones that were shown are
    decoded with those that are not yet.
    """

    def __init__(self, text_of: Callable[[Sequence[int]], str]):
        self._text_of = text_of
        self._shown: list[int] = []
        self._new: list[int] = []

    def take(self, token: int) -> str:
        self._new.append(token)
        return self._text(whole=True)

    def end(self) -> str:
        """Bytes that never became a character."""
        return self._text(whole=False) if self._new else ""

    def _text(self, *, whole: bool) -> str:
        text = self._text_of([*self._shown, *self._new])
        if whole and text.endswith(_BROKEN):
            return ""
        before = self._text_of(self._shown)
        self._shown, self._new = self._new, []
        return text[len(before) :]
