"""Every question of a set answered and graded, under one version of the weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import SamerouteError
from pipeline.evaluation.opened_set import OpenedSet
from pipeline.rewards import Verdict
from pipeline.rollout.grading import Grading, Judge
from pipeline.rollout.sampler import Attempts, all_or_none, of_sample
from pipeline.rollout.session import Engine, Session
from pipeline.types import Episode, Prompt, Rollout

_LOOK_S = 0.2  # between two looks at whether to give up


class EvaluationError(SamerouteError):
    """An evaluation is not of the weights that it was to be of."""


class GivenUp(Exception):
    """It was asked to end; the message says why."""


class Servers(Engine, AbstractAsyncContextManager[Any], Protocol):
    """What answers; sampling belongs inside."""

    @property
    def version(self) -> int: ...


@dataclass(frozen=True)
class Answer:
    """One answer. text: without the stop token that ended it. given: what it votes for; None: nothing."""

    prompt: Prompt
    sample: int
    rollout: Rollout
    text: str
    verdict: Verdict
    given: str | None


async def ask(
    asked: OpenedSet,
    servers: Servers,
    grading: Grading,
    *,
    at_once: int,
    give_up: Callable[[], str | None] = lambda: None,
    done: Callable[[int, int], None] = lambda *_: None,
    attempts: Attempts | None = None,
) -> list[Answer]:
    """Answers in the order of the questions, the samples of each in theirs.

    at_once: answers in flight. give_up: looked at meanwhile; why to end, or None. done: told how many answers are
    graded, and of how many. attempts: make episodes of many turns; None: each is one answer. Raises GivenUp,
    EvaluationError where a token is of other weights, and what sampling and grading raise.
    """
    version, places = servers.version, asyncio.Semaphore(at_once)
    total, graded = len(asked.prompts) * asked.config.samples, 0

    async def one(prompt: Prompt, sample: int, judge: Judge) -> Answer:
        nonlocal graded
        own, group = of_sample(asked.sampling, prompt, sample), (asked.name, prompt.index)
        async with places:
            if attempts is None:
                episode = Episode((await Session(servers, prompt.ids, group=group).sample(own),))
            else:
                episode = await attempts.begin(servers, prompt, own, group).play()
        rollout = episode.last
        if not all(one.is_of(version) for one in episode.rollouts if one.trained_tokens):
            found = sorted({int(v) for one in episode.rollouts for v in one.weight_versions[one.trained]})
            raise EvaluationError(
                f"the evaluation {asked.name} is of version {version} of the weights, and an answer to question "
                f"{prompt.index} has tokens of {found}"
            )
        verdict = episode.verdict or await judge.ask(prompt, episode)
        graded += 1
        done(graded, total)
        vote = asked.given.get(prompt.source) if rollout.finish_reason == "stop" else None
        given = None if vote is None else vote(verdict.response)
        return Answer(prompt, sample, rollout, verdict.response, verdict, given)

    async def watch() -> None:
        while (why := give_up()) is None:
            await asyncio.sleep(_LOOK_S)
        raise GivenUp(why)

    async with servers, grading.judge() as judge:
        answers = asyncio.create_task(
            all_or_none([one(p, i, judge) for p in asked.prompts for i in range(asked.config.samples)])
        )
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait({answers, watching}, return_when=asyncio.FIRST_COMPLETED)
            return answers.result() if answers.done() else watching.result()  # pyright: ignore[reportReturnType]
        finally:
            for task in (answers, watching):
                task.cancel()
            await asyncio.gather(answers, watching, return_exceptions=True)
