"""The evaluations of a run: which are due after a step, their records, the best checkpoint, and the early end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import Config
from pipeline.evaluation.answering import GivenUp, Servers, ask
from pipeline.evaluation.best import Best
from pipeline.evaluation.opened_set import OpenedSet
from pipeline.evaluation.result import Evaluation, evaluation_of
from pipeline.rollout.grading import Graders, OwnGraders
from pipeline.rollout.sampler import Attempts

_SAYS_S = 30.0  # between two lines on how far a long evaluation is


class OnServers(Protocol):
    """Runs what samples, on the event loop that the servers' connections belong to."""

    def __call__[T](self, work: Callable[[], Coroutine[Any, Any, T]]) -> T: ...


def on_own_loop[T](work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """On an event loop that is there for this alone."""
    found: list[T] = []

    # asyncio.run would format what it returns, thousands of arrays, when it puts the interrupt handler back.
    async def run() -> None:
        found.append(await work())

    asyncio.run(run())
    return found[0]


def evaluate_set(
    asked: OpenedSet,
    servers: Servers,
    config: Config,
    *,
    step: int,
    graders: Graders | None = None,
    on_servers: OnServers = on_own_loop,
    give_up: Callable[[], str | None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
    attempts: Attempts | None = None,
) -> Evaluation:
    """One set, with a grader of its own. graders: where it grades; None: in children of this process. attempts: of an
    environment. say: hears how far a long one is. Else as `evaluation.answering.ask`."""
    began, told = time.monotonic(), time.monotonic()

    def done(graded: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _SAYS_S:
            told = time.monotonic()
            say(f"evaluate, {asked.name}: {graded:,} of {total:,} answers")

    at_once = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    version = servers.version
    with (graders or OwnGraders(asked.tokenizer)).open(asked.rewards, config.grading) as grading:
        answers = on_servers(
            lambda: ask(asked, servers, grading, at_once=at_once, give_up=give_up, done=done, attempts=attempts)
        )
    return evaluation_of(asked, answers, step=step, version=version, seconds=time.monotonic() - began)


class Records(Protocol):
    """What of a RunDirectory is needed here."""

    def record_evaluation(self, row: dict[str, Any], answers: Sequence[dict[str, Any]] | None) -> Path | None: ...


@dataclass
class Evaluations:
    """Of a run, from its first step to its last.

    servers, on_servers: what answers. last: step of the run. records: where they are written. give_up: why to end one
    that is going on, or None. done: of each set the step that it was last evaluated after. graders, attempts: see
    evaluate_set.
    """

    config: Config
    sets: Sequence[OpenedSet]
    servers: Servers
    on_servers: OnServers
    last: int
    records: Records
    say: Callable[[str], None]
    give_up: Callable[[], str | None] = lambda: None
    done: dict[str, int] = field(default_factory=dict)
    best: Best | None = None
    graders: Graders | None = None
    attempts: Attempts | None = None

    def __post_init__(self):
        if self.best is None and self.config.checkpoint.best is not None:
            self.best = Best(self.config.checkpoint.best)

    def after(self, step: int) -> dict[str, float]:
        """Evaluate what is due after a step and was not yet, 0 being the start; its metrics."""
        metrics: dict[str, float] = {}
        for asked in self.sets:
            if not asked.due(step, self.last) or self.done.get(asked.name) == step:
                continue
            if (why := self.give_up()) is None:
                try:
                    metrics |= self._evaluate(asked, step)
                    continue
                except GivenUp as given_up:
                    why = str(given_up)
            self._skip(asked, step, why)
        return metrics

    def better(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether the score of checkpoint.best rose."""
        if self.best is None or not self.best.better(step, metrics):
            return False
        self.say(str(self.best))
        return True

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end because nothing gets better."""
        return self.best is not None and self.best.exhausted

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON holds it."""
        return {"done": dict(self.done), "best": None if self.best is None else self.best.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; an evaluation that it lacks is made."""
        self.done = dict(state.get("done", {}))
        if self.config.checkpoint.best is not None:
            self.best = Best.restored(self.config.checkpoint.best, state.get("best"))

    def _evaluate(self, asked: OpenedSet, step: int) -> dict[str, float]:
        found = evaluate_set(
            asked,
            self.servers,
            self.config,
            step=step,
            graders=self.graders,
            on_servers=self.on_servers,
            give_up=self.give_up,
            say=self.say,
            attempts=self.attempts,
        )
        self.records.record_evaluation(found.row(), found.answers)
        self.done[asked.name] = step
        self.say(f"evaluate, {found}")
        return found.metrics()

    def _skip(self, asked: OpenedSet, step: int, why: str) -> None:
        self.records.record_evaluation({"step": step, "set": asked.name, "skipped": why}, None)
        self.say(f"evaluate, {asked.name} after step {step} is left out: {why}")
