"""Requests to sample, posted together and answered one by one.

An HTTP request costs SGLang about 1.5 ms in its process for HTTP, as much as many tokens of a small model. So what is
asked for at one moment goes in one HTTP request, each sample with a request id of its own, and their answers come in
one stream: the tokens of each now and then, which shows that it gets on, and all that belongs to them when it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import orjson

from pipeline.engine.sampling import OnTokens, Piece, unheard
from pipeline.engine.server import ServerError

_EVENT = b"data: "
STREAM_END = b"data: [DONE]\n\n"
_EACH = ("rid", "input_ids", "sampling_params", "extra_key")
_JOINED = ("output_token_logprobs", "output_token_sampling_mask", "output_token_sampling_logprobs")
_INTERVAL = {"stream_interval": 256}
"""Tokens of a piece of an answer, but for its last (`inside/intervals.py`); no token is sent twice
(`--incremental-streaming-output`)."""


@dataclass(eq=False)
class _Call:
    """on_tokens: hears of those that have come. pieces: of its answer, so far. at: where the next token will stand."""

    body: dict[str, Any]
    on_tokens: OnTokens
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    pieces: list[dict[str, Any]] = field(default_factory=list)
    at: int = 0

    def __post_init__(self) -> None:
        self.at = len(self.body["input_ids"])

    def take(self, piece: dict[str, Any]) -> None:
        self.pieces.append(piece)
        if ids := tuple(piece["output_ids"]):
            self.on_tokens(Piece(self.at, ids, _logprobs(piece["meta_info"]), _stopped(piece["meta_info"])))
            self.at += len(ids)
        if piece["meta_info"]["finish_reason"] is not None:
            self.answer.set_result(_joined(self.pieces))


def _logprobs(meta: dict[str, Any]) -> tuple[float, ...]:
    """Of the tokens of a piece: over those that were kept, where that was asked for."""
    kept = meta.get("output_token_sampling_logprobs")
    return tuple(pair[0] for pair in meta.get("output_token_logprobs", ())) if kept is None else tuple(kept)


def _stopped(meta: dict[str, Any]) -> bool:
    return meta["finish_reason"] is not None and meta["finish_reason"]["type"] == "stop"


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer: what is of single tokens from all pieces, the rest from the last."""
    last = dict(pieces[-1])
    last["output_ids"] = [token for piece in pieces for token in piece["output_ids"]]
    metas = [piece["meta_info"] for piece in pieces]
    of_tokens = {name: [item for meta in metas for item in meta[name]] for name in _JOINED if name in metas[-1]}
    last["meta_info"] = metas[-1] | of_tokens
    return last


class RequestStream:
    """post: the HTTP request, as a stream of bytes. end: aborts a request by its id. gather_s: how long the first of
    those that go together waits for others; 0: for what is ready at its moment."""

    def __init__(
        self,
        post: Callable[[dict[str, Any]], AsyncIterator[bytes]],
        end: Callable[[str], Coroutine[Any, Any, None]],
        gather_s: float = 0.0,
    ):
        self._post, self._end, self._gather_s = post, end, gather_s
        self._waiting: list[_Call] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, body: dict[str, Any], on_tokens: OnTokens = unheard) -> dict[str, Any]:
        """The answer to a /generate of one sample. Given up (CancelledError), its request is aborted.

        on_tokens: called with those that have come. Raises ServerError in SGLang's words for what it refuses, and what
        `post` raises.
        """
        call = _Call(body | {"sampling_params": _INTERVAL | body["sampling_params"]}, on_tokens)
        self._waiting.append(call)
        if len(self._waiting) == 1:  # whatever else is ready now asks before this is called
            loop = asyncio.get_running_loop()
            loop.call_later(self._gather_s, self._send) if self._gather_s else loop.call_soon(self._send)
        return await call.answer

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        alike: dict[str, list[_Call]] = {}
        for call in waiting:
            if not call.answer.done():
                shared = {name: value for name, value in call.body.items() if name not in _EACH}
                alike.setdefault(repr(sorted(shared.items())), []).append(call)
        for calls in alike.values():
            self._start(self._together(calls))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _together(self, calls: list[_Call]) -> None:
        """One HTTP request for all of them."""
        open_calls = {call.body["rid"]: call for call in calls}
        reading = asyncio.current_task()

        def settled(call: _Call) -> None:
            if open_calls.pop(call.body["rid"], None) is None or not call.answer.cancelled():
                return
            if open_calls:
                self._start(self._end(call.body["rid"]))
            elif reading is not None:
                reading.cancel()  # nobody listens any more: SGLang aborts what a closed connection asked for

        for call in calls:
            call.answer.add_done_callback(lambda _, call=call: settled(call))
        body = calls[0].body | {name: [call.body[name] for call in calls] for name in _EACH} | {"stream": True}
        try:
            async for line in _events(self._post(body)):
                if "error" in line:
                    self._refused(list(open_calls.values()), line["error"])
                    return
                if (call := open_calls.get(line["meta_info"]["id"])) is not None and not call.answer.done():
                    call.take(line)
            self._fail(open_calls, ServerError("the stream of answers ended before the answers had"))
        except Exception as error:  # a mistake of this code, or of who hears, too: else they would wait forever
            self._fail(open_calls, error)

    def _refused(self, calls: list[_Call], reason: dict[str, Any]) -> None:
        """SGLang refuses all for one of them: it is found by asking each alone."""
        for call in calls:
            if len(calls) > 1:
                self._start(self._together([call]))
            else:
                words = f"/generate answered {reason.get('code')}: {reason.get('message')}"
                call.answer.set_exception(ServerError(words))

    @staticmethod
    def _fail(calls: dict[str, _Call], error: Exception) -> None:
        for call in list(calls.values()):
            if not call.answer.done():
                call.answer.set_exception(error)

    async def close(self) -> None:
        """Give up what is still open."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events."""
    rest = bytearray()
    async for chunk in chunks:
        start = max(0, len(rest) - 1)
        rest += chunk
        while (end := rest.find(b"\n\n", start)) >= 0:
            with memoryview(rest) as read:
                event = bytes(read[len(_EVENT) : end] if rest.startswith(_EVENT) else read[:end])
            start = 0
            del rest[: end + 2]
            if event != b"[DONE]":
                try:
                    yield orjson.loads(event)
                except ValueError as error:
                    raise ServerError(f"/generate answered what is no JSON: {event[:200]!r}") from error
