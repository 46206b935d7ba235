"""The one way to sample: a token sequence that grows.

    session = Session(engine, prompt_ids)
    rollout = await session.sample(sampling)      # until the answer ends, through any number of interruptions
    session.append(what_a_tool_said)              # tokens that nobody sampled
    rollout = await session.sample(sampling)      # the next turn, of the same rollout

Tokens are never made again from text, and what is there never changes: an interruption adds to the sequence, so do a
turn and an appended observation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import OnTokens, Piece, Sampling, unheard
from pipeline.types import Rollout, Sampled


class Engine(Protocol):
    """What samples after a sequence: a server's client or a fleet. See `SGLangClient.sample`."""

    async def sample(
        self,
        token_ids: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        routes_from: int = 0,
        group: object = None,
        on_tokens: OnTokens = ...,
    ) -> Sampled: ...


class Session:
    """One growing sequence.

    rollout: what has been sampled so far, an unfinished answer included; None before the first token.
    interruptions: how often an answer was cut and gone on with.
    moved: when tokens of it last came, seconds of time.monotonic(); at first when it was made.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: Sequence[int] | np.ndarray,
        *,
        group: object = None,
        rollout: Rollout | None = None,
    ):
        """prompt_ids: [P] token ids, at least one. group: sessions of one are sampled by one server where that is
        possible, so that they share its prefix cache. rollout: to go on from, of this prompt."""
        self._engine, self._group = engine, group
        self._prompt = np.asarray(prompt_ids)
        self._between = np.empty(0, np.int32)
        self.rollout = rollout
        self.interruptions = 0
        self.moved = time.monotonic()

    @property
    def token_ids(self) -> np.ndarray:
        """[T]: all that stands there, what was appended last included."""
        start = self._prompt if self.rollout is None else self.rollout.token_ids
        return np.concatenate([start, self._between]) if len(self._between) else start

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that sampled a token of it; None before the first."""
        if self.rollout is None or not self.rollout.trained_tokens:
            return None
        return int(self.rollout.weight_versions[self.rollout.trained].min())

    def append(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Tokens [A] that the policy did not sample. They become part of the rollout with the next sample, which brings
        their routes. Before the first sample they belong to the prompt."""
        self._between = np.concatenate([self._between, np.asarray(token_ids, np.int32)])

    async def sample(self, sampling: Sampling, on_tokens: OnTokens = unheard) -> Rollout:
        """Sample until the answer ends; a request that was interrupted is gone on with.

        sampling.max_new_tokens: of this answer, over all its requests. on_tokens: hears of all its tokens before this
        returns, as they come. Returns the whole rollout. When the caller gives up (CancelledError), `rollout` holds the
        requests that had ended. Raises what `Engine.sample` raises.
        """
        left, heard = sampling.max_new_tokens, len(self.token_ids)

        def hear(piece: Piece) -> None:
            nonlocal heard
            self.moved, heard = time.monotonic(), piece.at + len(piece.ids)
            on_tokens(piece)

        while True:
            part = await self._engine.sample(
                self.token_ids,
                replace(sampling, max_new_tokens=left),
                routes_from=0 if self.rollout is None else len(self.rollout.token_ids) - 1,
                group=self._group,
                on_tokens=hear,
            )
            left -= len(part.ids)
            self._take(part)
            if (behind := len(self.token_ids) - heard) > 0:
                hear(_end_of(part, behind, len(self.token_ids)))
            if part.finish_reason != "abort":
                assert self.rollout is not None
                return self.rollout
            self.interruptions += 1
            if left == 0:  # it was cut after the last token that it may have
                assert self.rollout is not None
                self.rollout = replace(self.rollout, finish_reason="length")
                return self.rollout

    def _take(self, part: Sampled) -> None:
        if not len(part.ids):
            return
        try:
            if self.rollout is None:
                self.rollout = Rollout.begun(self.token_ids.astype(np.int32), part)
            else:
                self.rollout = self.rollout.extended(part, self._between)
        except ValueError as error:
            raise AnswerError(str(error)) from error
        self._between = np.empty(0, np.int32)


def _end_of(part: Sampled, count: int, end: int) -> Piece:
    """Its last tokens, which stand before `end`."""
    ids, logprobs = part.ids[-count:].tolist(), part.logprobs[-count:].tolist()
    return Piece(end - count, tuple(ids), tuple(logprobs), ended=part.finish_reason == "stop")
