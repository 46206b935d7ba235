"""Conversations of a run: each a call of the environment in a thread of its own kind, within limits, never an error
that ends the run.

    begin -> a place is free -> run(conversation, prompt) in a thread -> an episode with its verdict

What an environment does wrong is a value: it raised, took too long, or returned no reward, and its episode has failed;
`grading.on_failure` says what becomes of that. So has one whose policy said what the chat template then changes, where
that is refused. What the servers do wrong ends the run, whatever the environment made of it.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.engine.interruption import given_up
from pipeline.engine.sampling import Sampling
from pipeline.environments.conversation import Conversation, LimitReached
from pipeline.environments.endpoint.listener import endpoint_metrics
from pipeline.environments.places import Place
from pipeline.environments.reward import Environment, Reward, reward_of
from pipeline.environments.templates import TemplateWriter
from pipeline.environments.turn_parser import TurnParser
from pipeline.rewards import Verdict, response_text
from pipeline.rewards.registry import describe
from pipeline.rollout.session import Engine
from pipeline.types import Episode, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOTICE_S = 1.0
"""That a thread may take to end a conversation whose time is over, before it is taken for blocked."""
_CUT = Reward()
"""A limit ended the conversation, and the environment had no more to say."""


class Environments:
    """The environment of a run, in its threads. A context; begun conversations belong inside."""

    def __init__(
        self,
        config: EnvironmentConfig,
        make: Callable[[], Environment],
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
    ):
        """make: see `environment_of`."""
        self.config, self.make, self.tokenizer, self.stop_token_ids = config, make, tokenizer, stop_token_ids
        self._places: list[Place[Environment]] = []
        self._gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )
        self._counts: Counter[str] = Counter()
        self._blocked = 0

    def __enter__(self) -> Self:
        self._places = [Place(self.make, number) for number in range(self.config.threads)]
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places:
            place.stop()
        self._places = []

    def begin(self, engine: Engine, prompt: Prompt, sampling: Sampling, group: object) -> Attempt:
        """One conversation, not begun yet. engine: used on the event loop that this is called on."""
        return Attempt(self, engine, prompt, sampling, group)

    def metrics(self) -> dict[str, float]:
        """Of the conversations that ended since the last call; environment/blocked_threads since the first."""
        counts, self._counts = self._counts, Counter()
        number = counts["conversations"]
        served = endpoint_metrics()
        if not number:
            return served
        cuts = {f"environment/cut_{by}": float(counts[f"cut_{by}"]) for by in ("turns", "tokens")}
        return (
            cuts
            | served
            | {
                "environment/conversations": float(number),
                "environment/turns_mean": counts["turns"] / number,
                "environment/rollouts_mean": counts["rollouts"] / number,
                "environment/sampled_share": counts["sampled"] / max(counts["tokens"], 1),
                "environment/seams": float(counts["seams"]),
                "environment/failed": float(counts["failed"]),
                "environment/timeouts": float(counts["timeouts"]),
                "environment/blocked_threads": float(self._blocked),
            }
        )

    @property
    def gate(self) -> asyncio.Semaphore:
        """Of the running loop: so many conversations at a time, the others wait for one to end."""
        loop = asyncio.get_running_loop()
        if loop not in self._gates:
            self._gates[loop] = asyncio.Semaphore(self.config.at_once)
        return self._gates[loop]

    async def converse(self, conversation: Conversation, prompt: Prompt) -> Reward | Verdict:
        """What the environment says of a conversation, or why it says nothing."""
        place = min(self._places, key=lambda place: place.load)
        place.load += 1
        own = copy.deepcopy(prompt)  # what it changes there, no other attempt sees
        work = asyncio.wrap_future(place.submit(_run(place.environment, conversation, own)))
        try:
            done, _ = await asyncio.wait({work}, timeout=self.config.timeout_s)
            if done:
                return work.result()
            work.cancel()
            self._counts["timeouts"] += 1
            if not await place.answers(_NOTICE_S):
                self._replace(place)
        finally:
            work.cancel()
            place.load -= 1
        what = f"took more than {self.config.timeout_s:g} s (environment.timeout_s), in turn {conversation.turns}"
        return Verdict(kind="timeout", what=what)

    def episode(self, conversation: Conversation, told: Reward | Verdict, prompt: Prompt, seconds: float) -> Episode:
        """A conversation that has ended. told: of it."""
        rollouts = conversation.rollouts or (_nothing(prompt),)
        self._count(conversation, rollouts, failed=isinstance(told, Verdict))
        response = response_text(rollouts[-1], self.tokenizer)
        if isinstance(told, Verdict):
            return Episode(rollouts, verdict=dataclasses.replace(told, response=response))
        parts = {name: Verdict(float(value)) for name, value in told.parts.items()}
        cut = "" if conversation.cut is None else f"cut: it had its {conversation.cut}"
        return Episode(
            rollouts,
            verdict=Verdict(told.total(), seconds=seconds, parts=parts, response=response),
            turn_rewards=conversation.turn_rewards(by_turn) if (by_turn := told.by_turn()) else None,
            calls=conversation.calls,
            note="; ".join(text for text in (cut, told.note) if text),
        )

    def _count(self, conversation: Conversation, rollouts: Sequence[Rollout], *, failed: bool) -> None:
        self._counts.update(
            conversations=1,
            turns=conversation.turns,
            rollouts=len(rollouts),
            sampled=sum(rollout.trained_tokens for rollout in rollouts),
            tokens=sum(map(len, rollouts)),
            seams=conversation.seams,
            failed=int(failed),
        )
        if conversation.cut is not None:
            self._counts[f"cut_{conversation.cut}"] += 1

    def _replace(self, place: Place[Environment]) -> None:
        """A thread that something blocks is left behind, and another takes its place."""
        if place in self._places:  # and not replaced already, after another of its conversations
            self._blocked += 1
            place.stop(0.0)
            self._places[self._places.index(place)] = Place(self.make, len(self._places) + self._blocked)


class Attempt:
    """One conversation with a prompt."""

    def __init__(self, owner: Environments, engine: Engine, prompt: Prompt, sampling: Sampling, group: object):
        config = owner.config
        assert prompt.opening is not None, "a prompt of a dump begins no conversation"
        writer = TemplateWriter(owner.tokenizer, prompt.opening, owner.stop_token_ids)
        self._owner, self._prompt, self._made = owner, prompt, time.monotonic()
        self._conversation = Conversation(
            engine,
            prompt,
            writer,
            sampling,
            max_turns=config.max_turns,
            max_tokens=config.max_tokens,
            history=config.history,
            group=group,
            parser=turn_parser(config),
        )

    @property
    def begun(self) -> bool:
        """Whether a token of it may have been sampled."""
        return self._conversation.begun

    @property
    def moved(self) -> float:
        """When it last got further, seconds of time.monotonic()."""
        return self._conversation.moved

    async def play(self) -> Episode:
        """From its first turn to its reward. Raises what sampling raises."""
        async with self._owner.gate:
            began = time.monotonic()
            told = await self._owner.converse(self._conversation, self._prompt)
            if self._conversation.error is not None:
                raise self._conversation.error
            if told is _CUT:
                told = Reward(self._owner.config.cut_reward)
            if isinstance(told, Reward) and not self._conversation.rollouts:
                told = Verdict(kind="not_a_number", what="ended without having sampled anything")
            return self._owner.episode(self._conversation, told, self._prompt, time.monotonic() - began)


async def _run(environment: Environment, conversation: Conversation, prompt: Prompt) -> Any:
    try:
        told = await environment.run(conversation, prompt)
    except LimitReached:
        return _CUT
    except BaseException as error:  # of a user's code, SystemExit too
        if isinstance(error, asyncio.CancelledError) and given_up():
            raise
        return Verdict(kind="raised", what=f"raised {describe(error)}")
    try:
        return reward_of(told, conversation.turns)
    except (ValueError, TypeError) as error:
        return Verdict(kind="not_a_number", what=str(error))
    except Exception as error:  # of numbers and mappings of the user's own
        return Verdict(kind="not_a_number", what=f"returned what is no reward: {describe(error)}")


def turn_parser(config: EnvironmentConfig) -> TurnParser:
    """For programs that talk over HTTP."""
    return TurnParser(config.tool_parser, config.reasoning_parser)


def _nothing(prompt: Prompt) -> Rollout:
    """The rollout of an episode of which nothing was sampled."""
    none = np.empty(0, np.int32)
    return Rollout(prompt.ids.astype(np.int32), none, np.empty(0, np.float32), None, none, "abort")
