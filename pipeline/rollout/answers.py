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
from pipeline.types import Rollout


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

    def begin(self, prompt_ids: np.ndarray, number: int, sampling: Sampling) -> Answer:
        """Sample `number` of a prompt [P]. sampling.seed: of the prompt's first sample."""
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


class DrainedFleet:
    """Answers of a fleet, one request each. A transfer waits until those in flight have ended; new ones wait for it."""

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

    async def __aexit__(self, *_: object) -> None:
        await self.fleet.__aexit__(None, None, None)

    def begin(self, prompt_ids: np.ndarray, number: int, sampling: Sampling) -> Answer:
        seed = None if sampling.seed is None else sampling.seed + number
        return _WholeAnswer(self, prompt_ids, replace(sampling, seed=seed))

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
        return await asyncio.gather(*(serving[i % len(serving)].score(ids) for i, ids in enumerate(sequences)))

    @property
    def servers(self) -> tuple[int, int]:
        serving = [s for s in self.fleet.servers if s.state is ServerState.SERVING]
        return len(serving), sum(s.in_flight == 0 for s in serving)

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around a request; waits while a transfer is due."""
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


class _WholeAnswer:
    """One that comes as a whole or not at all."""

    def __init__(self, answers: DrainedFleet, prompt_ids: np.ndarray, sampling: Sampling):
        self._answers, self._prompt_ids, self._sampling = answers, prompt_ids, sampling
        self._task: asyncio.Task[list[Rollout]] | None = None
        self._cut = self.begun = False
        self.rollout: Rollout | None = None

    async def result(self) -> Rollout | None:
        self._task = asyncio.ensure_future(self._sample())
        try:
            (self.rollout,) = await self._task
        except asyncio.CancelledError:
            self._task.cancel()
            if not self._cut:
                raise
        return self.rollout

    async def _sample(self) -> list[Rollout]:
        async with self._answers.request():
            self.begun = True
            return await self._answers.fleet.generate(self._prompt_ids, 1, self._sampling)

    def cut(self) -> None:
        self._cut = True
        if self._task is not None:
            self._task.cancel()
