"""One answer of one prompt at a time: what a producer asks of the servers, and how the fleet does it.

An answer is a request of its own, so that it ends when it ends and not with the longest of its group.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol, Self

import numpy as np

from pipeline.config.run import Interrupt
from pipeline.engine.client import Sampling
from pipeline.engine.fleet import Fleet, ServerState
from pipeline.engine.server import ServerError
from pipeline.rollout.sampler import of_sample
from pipeline.rollout.session import Session
from pipeline.types import Prompt, Rollout


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

    async def result(self) -> Rollout | None:
        """Sample it to its end; None where it was cut before its first token. Raises ServerError, AnswerError."""
        ...

    def cut(self) -> None:
        """It ends with what it has, finish_reason "time"."""
        ...


class Answers(Protocol):
    """Where answers come from. An async context; everything belongs inside."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    def begin(self, prompt: Prompt, number: int, sampling: Sampling, so_far: Rollout | None = None) -> Answer:
        """Sample `number` of a prompt. sampling: of the run. so_far: what is to be gone on with."""
        ...

    def interrupted(self, how: Interrupt) -> AbstractAsyncContextManager[None]:
        """Nothing runs on the servers inside, which may then take new weights; afterwards all goes on."""
        ...

    async def score(self, sequences: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Log-probs and routes of sequences [T] under the servers' weights, see SGLangClient.score; dealt to the
        servers in turn."""
        ...

    @property
    def servers(self) -> tuple[int, int]:
        """How many servers take requests, and how many of those have none."""
        ...


class FleetAnswers:
    """Answers of a fleet, a session each. A transfer waits until those in flight have ended; new ones wait for it."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet
        self._open = asyncio.Event()
        self._quiet = asyncio.Event()
        self._in_flight = 0
        self._open.set()
        self._quiet.set()

    async def __aenter__(self) -> Self:
        await self.fleet.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.fleet.__aexit__(None, None, None)

    def begin(self, prompt: Prompt, number: int, sampling: Sampling, so_far: Rollout | None = None) -> Answer:
        return _SessionAnswer(self, prompt, of_sample(sampling, prompt, number), so_far)

    @contextlib.asynccontextmanager
    async def interrupted(self, how: Interrupt) -> AsyncIterator[None]:
        assert how == "drain", how
        self._open.clear()
        await self._quiet.wait()
        try:
            yield
        finally:
            self._open.set()

    async def score(self, sequences: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        serving = [s.client for s in self.fleet.servers if s.state is ServerState.SERVING]
        if not serving:
            raise ServerError("no server takes requests")
        return await asyncio.gather(*(serving[i % len(serving)].score(ids) for i, ids in enumerate(sequences)))

    @property
    def servers(self) -> tuple[int, int]:
        serving = [s for s in self.fleet.servers if s.state is ServerState.SERVING]
        return len(serving), sum(s.in_flight == 0 for s in serving)

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around an answer; waits while a transfer is due."""
        while not self._open.is_set():
            await self._open.wait()
        self._in_flight += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._quiet.set()


class _SessionAnswer:
    """One answer, from its first token or from what was saved of it."""

    def __init__(self, answers: FleetAnswers, prompt: Prompt, sampling: Sampling, so_far: Rollout | None):
        self._answers = answers
        self._session = Session(answers.fleet, prompt.ids, group=prompt.index, rollout=so_far)
        left = sampling.max_new_tokens - (0 if so_far is None else so_far.trained_tokens)
        self._sampling = replace(sampling, max_new_tokens=left)
        self._task: asyncio.Task[Rollout] | None = None
        self._cut = False
        self.begun = so_far is not None

    @property
    def rollout(self) -> Rollout | None:
        return self._session.rollout

    async def result(self) -> Rollout | None:
        self._task = asyncio.ensure_future(self._sample())
        try:
            return await self._task
        except asyncio.CancelledError:
            self._task.cancel()
            if not self._cut:
                raise
        return None if self.rollout is None else replace(self.rollout, finish_reason="time")

    async def _sample(self) -> Rollout:
        if not self._sampling.max_new_tokens:  # what was saved of it is all that it may have
            assert self.rollout is not None
            return replace(self.rollout, finish_reason="length")
        async with self._answers.request():
            self.begun = True
            return await self._session.sample(self._sampling)

    def cut(self) -> None:
        self._cut = True
        if self._task is not None:
            self._task.cancel()
