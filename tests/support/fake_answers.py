"""Servers and a verifier that are made up, on an event loop, for what producers of rollouts do with them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import numpy as np

from pipeline.rewards import Verdict
from pipeline.types import Prompt, Rollout


class FakePrompts:
    """Prompt i is the token i."""

    def __init__(self):
        self.cursor, self.graded = 0, []

    def take(self, n):
        self.cursor += n
        indices = range(self.cursor - n, self.cursor)
        return [Prompt(np.array([i], np.int32), f"prompt {i}", {"answer": i}, i, f"made:{i}") for i in indices]

    def learned(self, prompt, rewards):
        self.graded.append(prompt.index)

    def metrics(self):
        return {"data/made/epoch": 0.0}

    def state(self):
        return {"prompts": self.cursor, "supervised": 0}


class FakeAnswer:
    def __init__(self, answers, prompt, number):
        self.answers, self.prompt, self.number = answers, prompt, number
        self.rollout, self.begun = None, False
        self.is_cut = asyncio.Event()

    @property
    def moved(self):
        return time.monotonic() if self.answers.moving else 0.0

    def cut(self):
        self.is_cut.set()

    async def result(self):
        answers = self.answers
        while not answers.gate.is_set():
            await answers.gate.wait()
        answers.in_flight += 1
        self.begun = True
        answers.asked[self.prompt, self.number] += 1
        versions = [answers.version]
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.is_cut.wait(), answers.seconds(self.prompt, self.number))
            while not answers.drain and not answers.gate.is_set():  # it stands still
                await answers.gate.wait()
            if answers.error is not None and self.prompt == answers.error_at:
                raise answers.error
            if self.is_cut.is_set() and answers.mute:
                return None
            versions = versions if answers.version == versions[0] else [*versions, answers.version]
            reason = "time" if self.is_cut.is_set() else "stop"
            self.rollout = Rollout(
                prompt_ids=np.array([self.prompt], np.int32),
                response_ids=np.array([self.number] * len(versions), np.int32),
                rollout_logprobs=np.full(len(versions), -1.0, np.float32),
                routes=None,
                weight_versions=np.array(versions, np.int32),
                finish_reason=reason,
            )
            return self.rollout
        finally:
            answers.in_flight -= 1
            if not answers.in_flight:
                answers.quiet.set()


class FakeAnswers:
    """seconds: of an answer, by prompt and sample. drain: a transfer waits for what is in flight; else that goes on and
    has tokens of both versions. error: raised by the answers to prompt error_at. mute: an answer that is cut has no
    token. moving: tokens come all the time."""

    def __init__(self, seconds=lambda prompt, number: 0.001, *, version=1, drain=True):
        self.seconds, self.version, self.drain = seconds, version, drain
        self.error, self.error_at, self.mute, self.moving = None, None, False, False
        self.in_flight = 0
        self.asked, self.begun_with = Counter(), {}
        self.scored = []

    async def __aenter__(self):
        self.gate, self.quiet = asyncio.Event(), asyncio.Event()
        self.gate.set()
        return self

    async def __aexit__(self, *_):
        assert not self.in_flight, "requests are left"

    def begin(self, prompt, number, sampling, so_far=None):
        self.begun_with[prompt.index, number] = so_far
        return FakeAnswer(self, prompt.index, number)

    @contextlib.asynccontextmanager
    async def interrupted(self):
        self.gate.clear()
        while self.drain and self.in_flight:
            self.quiet.clear()
            await self.quiet.wait()
        try:
            yield
        finally:
            self.gate.set()

    async def score(self, rollouts, each):
        self.scored.append((self.version, each))
        return [(r, np.full(len(r.token_ids) - 1, -1.0, np.float32), None) for r in (rollouts * each)[:each]]

    @property
    def servers(self):
        return 1, int(not self.in_flight)


class FakeJudge:
    """verdict: of a prompt's index and a sample. seconds: that it takes."""

    def __init__(self, verdict=lambda prompt, number: Verdict(reward=float(number % 2)), seconds=0.0):
        self.verdict, self.seconds = verdict, seconds

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def ask(self, prompt, episode):
        await asyncio.sleep(self.seconds)
        return self.verdict(prompt.index, int(episode.last.response_ids[0]))
