"""One answer of one prompt at a time: what a producer asks of the servers, and how the fleet does it.

An answer is a request of its own, so that it ends when it ends and not with the longest of its group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol, Self

import numpy as np

from pipeline.config.run import InterruptMode
from pipeline.engine.client import AbortedError
from pipeline.engine.control import UnreachableError
from pipeline.engine.fleet import Fleet, ServerState
from pipeline.engine.interruption import HALTS, given_up
from pipeline.engine.sampling import Sampling
from pipeline.rollout.sampler import Attempt, Attempts, of_sample
from pipeline.rollout.session import Session
from pipeline.stored import Routes
from pipeline.types import Episode, Prompt, Rollout

Scored = tuple[Rollout, np.ndarray, Routes | None]
"""A rollout, and of all its tokens log-probs [T - 1] and routes under the servers' weights, see SGLangClient.score."""


class Answer(Protocol):
    """One answer that is being sampled."""

    @property
    def rollout(self) -> Rollout | None:
        """What is known of it so far; None: no token."""
        ...

    @property
    def begun(self) -> bool:
        """Whether a token of it may have been sampled."""
        ...

    @property
    def moved(self) -> float:
        """When it last got further, seconds of time.monotonic()."""
        ...

    async def result(self) -> Rollout | Episode | None:
        """Sample it to its end; None where it was cut before its first token. An episode has a verdict. Raises
        ServerError, AnswerError."""
        ...

    def cut(self) -> None:
        """It ends with what it has, finish_reason "time"; a conversation ends without anything."""
        ...


class Answers(Protocol):
    """Where answers come from. An async context; everything belongs inside."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    def begin(self, prompt: Prompt, number: int, sampling: Sampling, so_far: Rollout | None = None) -> Answer:
        """Sample `number` of a prompt. sampling: of the run. so_far: what is to be gone on with."""
        ...

    def interrupted(self) -> AbstractAsyncContextManager[None]:
        """Nothing is sampled inside, where the servers may take new weights; afterwards all goes on."""
        ...

    async def score(self, rollouts: Sequence[Rollout], each: int) -> list[Scored]:
        """Some of these rollouts, spread over them, `each` on every server, under the weights that it holds."""
        ...

    @property
    def servers(self) -> tuple[int, int]:
        """How many servers take requests, and how many of those have none."""
        ...


class FleetAnswers:
    """Answers of a fleet, a session each."""

    def __init__(self, fleet: Fleet, how: InterruptMode, attempts: Attempts | None = None):
        """how: weights change while answers are in flight. attempts: of many turns; None: each is one answer."""
        self.fleet, self.attempts = fleet, attempts
        self.how: InterruptMode = how

    async def __aenter__(self) -> Self:
        await self.fleet.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.fleet.__aexit__(None, None, None)

    def begin(self, prompt: Prompt, number: int, sampling: Sampling, so_far: Rollout | None = None) -> Answer:
        own = of_sample(sampling, prompt, number)
        if self.attempts is not None:
            return _AttemptAnswer(self.attempts.begin(self.fleet, prompt, own, prompt.index))
        return _SessionAnswer(self, prompt, own, so_far)

    def interrupted(self) -> AbstractAsyncContextManager[None]:
        return self.fleet.interrupted(self.how)

    async def score(self, rollouts: Sequence[Rollout], each: int) -> list[Scored]:
        up = [s for s in self.fleet.servers if s.state in (ServerState.SERVING, ServerState.PAUSED)]
        count = max(1, len(up)) * each
        spread = rollouts[:: -(-len(rollouts) // count)]
        dealt = [spread[i % len(spread)] for i in range(count if spread else 0)]
        calls = [up[i % len(up)].client.score(r.token_ids) for i, r in enumerate(dealt) if up]
        found = await asyncio.gather(*calls, return_exceptions=True)
        scored: list[Scored] = []
        for rollout, score in zip(dealt, found, strict=bool(up)):
            if not isinstance(score, BaseException):
                scored.append((rollout, *score))
            elif not isinstance(score, UnreachableError | AbortedError):  # of a lost server, which the fleet sees
                raise score
        return scored or [(rollout, *await self.fleet.score(rollout.token_ids)) for rollout in dealt[:each]]

    @property
    def servers(self) -> tuple[int, int]:
        serving = [s for s in self.fleet.servers if s.state is ServerState.SERVING]
        return len(serving), sum(s.in_flight == 0 for s in serving)


class _SessionAnswer:
    """One answer, from its first token or from what was saved of it."""

    def __init__(self, answers: FleetAnswers, prompt: Prompt, sampling: Sampling, so_far: Rollout | None):
        self._session = Session(answers.fleet, prompt.ids, group=prompt.index, rollout=so_far)
        left = sampling.max_new_tokens - (0 if so_far is None else so_far.trained_tokens)
        self._sampling = replace(sampling, max_new_tokens=left)
        self._stands_still = answers.how in HALTS
        self._task: asyncio.Task[Rollout] | None = None
        self._cut = False

    @property
    def rollout(self) -> Rollout | None:
        return self._session.rollout

    @property
    def begun(self) -> bool:
        """A request that stands still through a transfer may have tokens that nobody here knows of."""
        return self.rollout is not None or (self._stands_still and self._task is not None)

    @property
    def moved(self) -> float:
        return self._session.moved

    async def result(self) -> Rollout | None:
        self._task = asyncio.ensure_future(self._sample())
        try:
            return await self._task
        except asyncio.CancelledError:
            self._task.cancel()
            if not self._cut or given_up():
                raise
        return None if self.rollout is None else replace(self.rollout, finish_reason="time")

    async def _sample(self) -> Rollout:
        if not self._sampling.max_new_tokens:  # what was saved of it is all that it may have
            assert self.rollout is not None
            return replace(self.rollout, finish_reason="length")
        return await self._session.sample(self._sampling)

    def cut(self) -> None:
        self._cut = True
        if self._task is not None:
            self._task.cancel()


class _AttemptAnswer:
    """One attempt of many turns. No part of it is saved: a run that is resumed begins it again."""

    rollout = None

    def __init__(self, attempt: Attempt):
        self._attempt = attempt
        self._task: asyncio.Task[Episode] | None = None
        self._cut = False

    @property
    def begun(self) -> bool:
        return self._attempt.begun

    @property
    def moved(self) -> float:
        return self._attempt.moved

    async def result(self) -> Episode | None:
        self._task = asyncio.ensure_future(self._attempt.play())
        try:
            return await self._task
        except asyncio.CancelledError:
            self._task.cancel()
            if not self._cut or given_up():
                raise
        return None

    def cut(self) -> None:
        self._cut = True
        if self._task is not None:
            self._task.cancel()
