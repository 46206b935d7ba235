"""A conversation in exact tokens: what the policy samples, and what others say in between.

    turn = await conversation.sample()                     # the policy speaks; turn.text, turn.message
    conversation.append([{"role": "tool", "content": "12"}])
    turn = await conversation.sample()                     # the next turn, of the same sequence

Tokens of the past are never made again from text. What is appended becomes the ids of the new suffix alone, which
nobody sampled and nobody is trained on. Where the chat template would change what stands there, the conversation is
refused, or goes on as another rollout: a new prompt made of all messages, of which only what is sampled from then on is
trained on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline.engine.sampling import OnTokens, Sampling, unheard
from pipeline.environments.templates import HistoryError, Message, TemplateWriter
from pipeline.environments.tool_calls import Call, calls_of
from pipeline.environments.turn_parser import TurnParser
from pipeline.rollout.session import Engine, Session
from pipeline.types import FinishReason, Opening, Prompt, Rollout

History = Literal["refuse", "split"]
CutBy = Literal["turns", "tokens"]


class LimitReached(Exception):
    """A conversation may not go on. An environment may catch it, and give the reward of what there is."""


class Misuse(Exception):
    """An environment asks a conversation for what it cannot do; the message says what to write instead."""


@dataclass(frozen=True)
class Turn:
    """What the policy said in one go.

    message: as the chat template takes it, part of `Conversation.messages`; an environment that has found tool calls or
             thinking in the text sets them there, by the names that the template reads.
    token_ids: [N] int32, the stop token included.  text: without it.
    finish_reason: "stop", or "length" where it was cut at a limit.
    """

    message: Message
    text: str
    token_ids: np.ndarray
    finish_reason: FinishReason


class Conversation:
    """One attempt at a prompt.

    messages: all that was said, in order, as dicts of role, content and what else the template reads.
    turns: that `sample` has given back; one that goes on is one.  cut: by which limit it was ended; None: by none.
    moved: when a token of it last came, seconds of time.monotonic().
    sampling, writer, parser: how turns are drawn, made of messages, and taken apart for programs that talk over HTTP.
    seams: turns that ended with another token than the template writes there.

    It may be used from another event loop than the one that it was made on, which the servers' connections belong to.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        writer: TemplateWriter,
        sampling: Sampling,
        *,
        max_turns: int,
        max_tokens: int,
        history: History = "refuse",
        group: object = None,
        parser: TurnParser | None = None,
    ):
        """prompt: with an opening. sampling.max_new_tokens: of one turn. max_tokens: of all that follows
        the prompt. group: as Session has it. parser: of turns, where programs talk to it over HTTP."""
        assert prompt.opening is not None, "a prompt of a dump begins no conversation"
        self._engine, self.writer, self.sampling, self._group = engine, writer, sampling, group
        self.parser = TurnParser() if parser is None else parser
        self._max_turns, self._max_tokens, self._history = max_turns, max_tokens, history
        self._room = len(prompt.ids) + max_tokens
        self._home = asyncio.get_running_loop()
        self._error: BaseException | None = None
        self._busy = self._speaking = False
        self._done: list[Rollout] = []
        self.turns = self.seams = 0
        self._unheard: list[int] = []
        self._first_heard = False  # whether `sample` gave back the last turn for the first time
        self._answered: list[tuple[Message, list[Message]]] = []  # turns, and what tools said to them
        self.cut: CutBy | None = None
        self.messages: list[Message] = [dict(message) for message in prompt.opening.messages]
        self._begin(prompt.ids, prompt.text)

    def _begin(self, ids: np.ndarray, text: str) -> None:
        self._session = Session(self._engine, ids, group=self._group)
        self._before, self._spoken = text, ""
        self._stop: str | None = None
        self._new: list[Message] = []

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """What has been sampled so far, each sampled token in one of them."""
        last = self._session.rollout
        return (*self._done, *([] if last is None else [last]))

    @property
    def error(self) -> BaseException | None:
        """What a server did, whatever an environment made of it: the run ends of it."""
        return self._error

    @property
    def begun(self) -> bool:
        """Whether a token of it may have been sampled."""
        return self._busy or bool(self.rollouts)

    @property
    def moved(self) -> float:
        return self._session.moved

    @property
    def opening(self) -> Opening:
        """Tools and variables that the template is given."""
        return self.writer.opening

    def append(self, messages: Sequence[Message]) -> None:
        """What others say; the next `sample` answers it. Raises Misuse for what is no message, and before the first
        turn: what is asked belongs to the prompt."""
        if not self.rollouts:
            raise Misuse("nothing was sampled yet; what stands before the first turn belongs to the prompt")
        new = _messages(messages)
        if any(message["role"] == "assistant" for message in new):
            raise Misuse("only the policy speaks as assistant; branch() begins anew with other messages")
        self._new += new
        self._answered[-1][1].extend(message for message in new if message["role"] == "tool")

    async def sample(self, *, max_new_tokens: int | None = None, on_tokens: OnTokens | None = None) -> Turn:
        """What the policy says to all that stands there. Without new messages a turn that was cut goes on.

        max_new_tokens: of this turn; null: of the run's. on_tokens: hears of each token as it is sampled, on the event
        loop that the conversation was made on. Raises LimitReached where the conversation has had its turns or its
        tokens, Misuse where the policy has said all and nothing was appended, or is speaking already, HistoryError
        where the template would change what stands there, and what sampling raises.
        """
        work = self._sample(max_new_tokens, on_tokens)
        if asyncio.get_running_loop() is self._home:
            return await work
        return await self._at_home(work)

    async def _at_home(self, work: Coroutine[Any, Any, Turn]) -> Turn:
        """Its result, from another event loop. Who is cancelled there goes on once the work has let go of all this."""
        ended: Future[Turn] = Future()
        begun: list[asyncio.Task[Turn]] = []

        def begin() -> None:
            task = self._home.create_task(work)
            task.add_done_callback(end)
            begun.append(task)

        def end(task: asyncio.Task[Turn]) -> None:
            if task.cancelled():
                ended.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                ended.set_exception(error)
            else:
                ended.set_result(task.result())

        self._home.call_soon_threadsafe(begin)
        waiting = asyncio.wrap_future(ended)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self._home.call_soon_threadsafe(lambda: begun[0].cancel())
            await asyncio.wait({waiting})
            if not waiting.cancelled() and waiting.exception() is None:
                self.unhear()
            raise

    def branch(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None) -> None:
        """Begin another rollout, whose prompt is these messages: for what does not continue the conversation. What was
        sampled before stays, and is trained on as the rollout that it is in. tools: from now on; None: as before.
        Raises Misuse for what is no message, HistoryError for messages that the template refuses, and leaves all as it
        is."""
        own = _messages(messages)
        if not own:
            raise Misuse("a branch begins with one message at least")
        writer = self.writer if tools is None else self.writer.with_tools(tools)
        text = writer.render(own)
        self.writer = writer
        if (last := self._session.rollout) is not None:
            self._done.append(last)
        self.messages = own
        self._begin(self.writer.ids(text), text)

    def turn_rewards(self, told: Sequence[float]) -> tuple[float, ...]:
        """Of all turns of `rollouts`, from one for each that `sample` gave back: nobody has seen the others, whose
        sampling was cancelled before its end, and they have 0."""
        own = iter(told)
        return tuple(0.0 if k in self._unheard else next(own) for k in range(self.turns + len(self._unheard)))

    def unhear(self) -> None:
        """What was sampled last reached nobody: it counts as if its sampling had been cancelled."""
        if self._first_heard:
            self._first_heard = False
            self.turns -= 1
            self._unheard.append(self.turns + len(self._unheard))

    @property
    def calls(self) -> tuple[tuple[Call, ...], ...]:
        """Tools that each turn of `rollouts` called, as far as it is known."""
        return tuple(calls_of(turn, answers) for turn, answers in self._answered)

    async def _sample(self, asked: int | None, on_tokens: OnTokens | None) -> Turn:
        if self._speaking:
            raise Misuse("the policy is speaking; wait for one sample() to end before the next")
        self._speaking = True
        try:
            self._grow()
            left, goes_on = self._room - len(self._session.token_ids), self._goes_on
            self._limit("turns", self._max_turns - self.turns + (goes_on and not self._last_unheard))
            self._limit("tokens", left)
            limit = min(left, self.sampling.max_new_tokens if asked is None else asked)
            sampling = replace(self.sampling, max_new_tokens=limit, each_token=on_tokens is not None)
            known, self._busy = len(self._session.token_ids), True
            rollout = await self._sampled(sampling, on_tokens or unheard, known, goes_on=goes_on)
            return self._take(rollout, known, goes_on=goes_on)
        finally:
            self._speaking = False

    async def _sampled(self, sampling: Sampling, on_tokens: OnTokens, known: int, *, goes_on: bool) -> Rollout:
        """The rollout with what is sampled now. Of what had come when it is cancelled, a turn is made that goes on."""
        try:
            return await self._session.sample(sampling, on_tokens)
        except asyncio.CancelledError:
            cut = self._session.rollout
            if cut is not None and len(cut.token_ids) > known:
                self._take(cut, known, goes_on=goes_on, heard=False)
            raise
        except Exception as error:  # of the servers; what the messages are wrong about, the environment is told alone
            self._error = self._error or error
            raise

    @property
    def _last_unheard(self) -> bool:
        """Whether `sample` has given back nothing of the last turn."""
        return self.turns + len(self._unheard) - 1 in self._unheard

    @property
    def _goes_on(self) -> bool:
        """Whether what stands there ends inside a turn of the policy."""
        last = self._session.rollout
        return last is not None and len(self._session.token_ids) == len(last.token_ids)

    def _limit(self, kind: CutBy, left: int) -> None:
        if left < 1:
            self.cut = self.cut or kind
            allowed = self._max_turns if kind == "turns" else self._max_tokens
            raise LimitReached(f"the conversation has had its {allowed} {kind} (environment.max_{kind})")

    def _grow(self) -> None:
        """The new messages become tokens."""
        if not self._new:
            if self._goes_on and self._stop is not None:
                raise Misuse("the policy has ended its turn; append what others say before it is sampled again")
            return
        messages = [*self.messages, *self._new]
        try:
            suffix, whole = self.writer.suffix(self._before, self._spoken, self._stop, self.messages, self._new)
        except HistoryError:
            if self._history == "refuse":
                raise
            self.branch(messages)
            return
        self.seams += self._stop is not None and suffix.startswith(self.writer.stops)
        ids = self.writer.ids(suffix)
        if not len(ids):
            raise Misuse(f"the chat template writes nothing for {self._new}, so that two turns would be one")
        self._session.append(ids)
        self.messages, self._new = messages, []
        self._before, self._spoken, self._stop = whole, "", None

    def _take(self, rollout: Rollout, known: int, *, goes_on: bool, heard: bool = True) -> Turn:
        """What was sampled behind `known` tokens. goes_on: the rest of a turn that was cut. heard: `sample` gives it
        back."""
        ids = rollout.token_ids[known:]
        ids.flags.writeable = False  # they are those that are trained on
        stopped = rollout.finish_reason == "stop"
        text = self.writer.text(ids[:-1] if stopped else ids)
        self._stop = self.writer.text(ids[-1:]) if stopped else None
        if goes_on:
            message = self.messages[-1]
            message["content"] = self._spoken + text
        else:
            message = {"role": "assistant", "content": text}
            self.messages.append(message)
            self._answered.append((message, []))
            self._unheard.append(self.turns + len(self._unheard))
        self._first_heard = heard and self._last_unheard
        if self._first_heard:
            self._unheard.pop()
            self.turns += 1
        self._spoken += text
        return Turn(message, text, ids, rollout.finish_reason)


def _messages(given: Sequence[Message]) -> list[Message]:
    """Copies. Raises Misuse for what is no list of messages."""
    if not isinstance(given, list | tuple):
        raise Misuse(f"messages are a list, not {given!r}")
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Misuse(f"a message is a mapping with a role and a content, not {message!r}")
    return [dict(message) for message in given]
