"""One conversation behind its address: a request becomes new messages, or a branch, and a turn of the policy.

One request at a time; another one on the same conversation waits. After a client that has gone away the next request
begins a branch, whatever it says: its prompt is what the client sends then. So what was sampled and never reached the
client stands in no history.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.engine.sampling import OnTokens, Piece
from pipeline.environments.conversation import Conversation, LimitReached, Turn
from pipeline.environments.endpoint.chat_request import ChatRequest
from pipeline.environments.endpoint.refusals import Refusal
from pipeline.environments.endpoint.said import rest, same, set_parts, to_message, wants_text
from pipeline.environments.endpoint.turn_stream import Delta, Retold, TurnStream
from pipeline.environments.templates import HistoryError, Message
from pipeline.environments.turn_parser import Said

Branch = Literal["opening", "history", "tools", "disconnect", "lost", "refused"]
"""Why a branch was begun: the client's own messages or tools before anything was sampled; messages that do not go on
from what was said; other tools; after a client that had gone away; after a stream whose server was lost; after messages
that a limit or the chat template refused."""


@dataclass(frozen=True)
class Spoken:
    """A turn for the client.

    message: of the conversation, which has the calls' ids. calls: (id, function, arguments in JSON). prompt_tokens:
    that stood before it. tokens, logprobs: of what the content was made of, without the stop token.
    """

    said: Said
    calls: tuple[tuple[str, str, str], ...]
    finish_reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


class ServedConversation:
    """error: a mistake of this code, which ends the attempt."""

    def __init__(self, conversation: Conversation, model: str, count: Callable[[str], None]):
        """count: one more of a name, for metrics."""
        self.model = model
        self.error: Exception | None = None
        self.ended = False
        self._conversation, self._parser, self._count = conversation, conversation.parser, count
        self._as_text = wants_text(conversation.writer)
        self._own_tools = list(conversation.opening.tools)
        self._turn = asyncio.Lock()
        self._requests: set[asyncio.Task[Spoken]] = set()
        self._must: Branch | None = None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta | Spoken]:
        """The next turn as it is sampled, and as a whole last. Raises Refusal, also behind the first pieces. Closed
        before its end, the sampling ends, and the turn counts as one that nobody has seen."""
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        delivered = False
        work = asyncio.ensure_future(self.answer(request, deltas.put_nowait))
        work.add_done_callback(lambda _: deltas.put_nowait(None))
        try:
            while (delta := await deltas.get()) is not None:
                yield delta
            yield work.result()
            delivered = True
        finally:
            if work.cancel():
                await asyncio.wait({work})
            elif not delivered and work.exception() is None:
                self._conversation.unhear()
                self._left()

    async def answer(self, request: ChatRequest, tell: Callable[[Delta], None] | None = None) -> Spoken:
        """The next turn. tell: hears of it as it is sampled. Raises Refusal."""
        work = asyncio.ensure_future(self._answer(request, tell))
        self._requests.add(work)
        try:
            return await work
        except asyncio.CancelledError:
            work.cancel()
            await asyncio.wait({work})
            own = asyncio.current_task()
            if self.ended and own is not None and not own.cancelling():  # the request was ended, not this task
                raise Refusal(401, "the conversation of this key has ended", code="invalid_api_key") from None
            raise
        finally:
            self._requests.discard(work)

    async def end(self) -> None:
        """Its key is dead; requests in flight are told so."""
        self.ended = True
        for work in self._requests:
            work.cancel()
        if self._requests:
            await asyncio.wait(set(self._requests))

    async def _answer(self, request: ChatRequest, tell: Callable[[Delta], None] | None) -> Spoken:
        conversation = self._conversation
        request.check(conversation.sampling, self.model)
        tools = self._own_tools if request.offered is None else request.offered
        if tools and self._parser.tools is None and request.tool_choice != "none":
            raise Refusal(
                400,
                "calls of tools could not be found: set environment.tool_parser to the model's, or send "
                "tool_choice=none",
                code="unsupported_value",
                param="tools",
            )
        async with self._turn:
            self._count("requests")
            wanted = tools if request.tool_choice != "none" else []
            try:
                self._place(request, tools)
                name = self._names()
                if tell is None:
                    turn = await self._sample(request)
                    return self._take(turn, self._parser.parse(turn.text, wanted), name)
                stream = TurnStream(conversation.writer.text, self._parser.stream(wanted), name)
                turn = await self._told(request, stream, tell)
                tell(stream.end())
                return self._take(turn, stream.said, name)
            except HistoryError as error:
                raise Refusal(400, str(error), code="template_refused", param="messages") from error
            except LimitReached as error:
                raise Refusal(400, str(error), code="context_length_exceeded", param="messages") from error
            except Retold as error:
                raise Refusal(503, str(error), code="engine_failed") from error

    def _place(self, request: ChatRequest, tools: list[dict[str, object]]) -> None:
        """The request's messages stand in the conversation, the last of them to be answered."""
        conversation = self._conversation
        sent = [to_message(message, as_text=self._as_text) for message in request.messages]
        new = rest(conversation.messages, sent)
        why = self._must
        if why is not None:
            pass
        elif not same(tools, list(conversation.opening.tools)):
            why = "tools" if conversation.turns else "opening"
        elif new is None or (new and not conversation.turns):
            why = "history" if conversation.turns else "opening"
        elif conversation.turns and (not new or any(message["role"] == "assistant" for message in new)):
            why = "history"
        if why is not None:
            conversation.branch(sent, tools=tools)
            self._must = None
            self._count(f"branches_{why}")
        elif new:
            conversation.append(new)

    async def _told(self, request: ChatRequest, stream: TurnStream, tell: Callable[[Delta], None]) -> Turn:
        """The turn, each piece of which is told as it comes. Raises Retold."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def hear(piece: Piece) -> None:  # on another event loop
            here.call_soon_threadsafe(pieces.put_nowait, piece)

        turn = asyncio.ensure_future(self._sample(request, hear))
        turn.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                tell(stream.take(piece))
            return turn.result()
        except Retold:
            self._must = "lost"
            self._count("streams_lost")
            if not turn.cancel() and turn.exception() is None:
                self._conversation.unhear()
            raise
        finally:
            if turn.cancel():
                await asyncio.wait({turn})

    async def _sample(self, request: ChatRequest, on_tokens: OnTokens | None = None) -> Turn:
        conversation, limit = self._conversation, self._conversation.sampling.max_new_tokens
        try:
            return await conversation.sample(max_new_tokens=min(limit, request.limit or limit), on_tokens=on_tokens)
        except asyncio.CancelledError:
            if self._must is None:
                self._left()
            raise
        except (HistoryError, LimitReached):
            self._must = "refused"
            raise
        except Exception as error:
            if conversation.error is None:
                raise
            raise Refusal(503, f"the rollout engine failed: {error}", code="engine_failed") from error

    def _left(self) -> None:
        """The client has gone away."""
        self._must = "disconnect"
        if not self.ended:
            self._count("disconnects")

    def _names(self) -> Callable[[int, str], str]:
        """Ids of the calls of the next turn, by their places and functions."""
        conversation = self._conversation
        number, before = conversation.turns + 1, _calls(conversation.messages)
        return lambda place, function: self._parser.call_id(number, place, before, function)

    def _take(self, turn: Turn, said: Said, name: Callable[[int, str], str]) -> Spoken:
        """The turn's parts are set on the conversation's message, by the names that templates read."""
        conversation = self._conversation
        calls = tuple((name(i, function), function, arguments) for i, (function, arguments) in enumerate(said.calls))
        set_parts(turn.message, said, calls, as_text=self._as_text)
        rollout, count = conversation.rollouts[-1], len(turn.token_ids)
        shown = count - (turn.finish_reason == "stop")
        return Spoken(
            said,
            calls,
            "tool_calls" if calls else ("stop" if turn.finish_reason == "stop" else "length"),
            prompt_tokens=len(rollout.token_ids) - count,
            completion_tokens=count,
            tokens=tuple(conversation.writer.text([int(i)]) for i in turn.token_ids[:shown]),
            logprobs=tuple(map(float, rollout.rollout_logprobs[len(rollout.rollout_logprobs) - count :][:shown])),
        )


def _calls(messages: list[Message]) -> int:
    return sum(len(message.get("tool_calls") or ()) for message in messages)
