"""A teacher on the road of an answer: it scores each one as it ends, while others are sampled and graded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np

from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.types import Episode, Rollout


class Scoring(Protocol):
    """What scores, an async context: see `TeacherFleet`."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, kind: None, error: None, trace: None) -> None: ...
    async def teach(self, token_ids: Sequence[int] | np.ndarray, start: int, top_k: int) -> TeacherScores: ...


@dataclass
class Teacher:
    """An async context; scores belong inside, on whichever event loop.

    top_k: the likeliest tokens that are asked for beside those that were sampled.
    """

    scoring: Scoring
    top_k: int = 0
    _seconds: list[float] = field(default_factory=list, init=False)
    _tokens: int = field(default=0, init=False)

    async def __aenter__(self) -> Self:
        await self.scoring.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.scoring.__aexit__(None, None, None)

    async def scored(self, episode: Episode) -> Episode:
        """With the teacher's scores of every rollout that has none. Raises ServerError, AnswerError."""
        rollouts = await asyncio.gather(*(self._of_rollout(rollout) for rollout in episode.rollouts))
        return replace(episode, rollouts=tuple(rollouts))

    async def _of_rollout(self, rollout: Rollout) -> Rollout:
        if rollout.teacher is not None:
            return rollout
        if not rollout.trained_tokens:
            return replace(rollout, teacher=TeacherScores.unread(len(rollout), self.top_k))
        began = time.monotonic()
        scores = await self.scoring.teach(rollout.token_ids, len(rollout.prompt_ids), self.top_k)
        self._seconds.append(time.monotonic() - began)
        self._tokens += rollout.trained_tokens
        return replace(rollout, teacher=scores)

    def metrics(self) -> dict[str, float]:
        """Of what was scored since the last call: tokens, and the seconds of one answer, waiting included."""
        seconds, self._seconds = self._seconds, []
        tokens, self._tokens = self._tokens, 0
        told = {"teacher/score_s": float(np.mean(seconds)), "teacher/score_s_max": max(seconds)} if seconds else {}
        return told | {"teacher/tokens": float(tokens)}
