"""Rollouts beside the training of a loop, from its first asynchronous step to its last."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from pipeline.loop.loop import Loop
from pipeline.loop.update import teaches
from pipeline.rollout.admission import Admission
from pipeline.rollout.answers import FleetAnswers
from pipeline.rollout.maker import Maker, Recipe
from pipeline.rollout.producer import Producer
from pipeline.rollout.saved import Saved


@contextlib.contextmanager
def asynchronous(loop: Loop, steps: int, saved: Saved | None) -> Iterator[None]:
    """The loop's steps take groups that are made meanwhile, where rollout.max_staleness is more than 0; nothing of that
    is left when the block ends.

    steps: that follow. saved: what the checkpoint that the run goes on from has of them.
    """
    if not (loop.config.rollout.max_staleness and steps and loop.grading is not None):
        yield
        return
    others = loop.trainers.watch
    with Producer(lambda: _maker(loop, steps, saved), watch=loop.fleet.check_alive) as producer:

        def watch() -> None:
            others()
            producer.check()

        loop.producer, loop.trainers.watch = producer, watch
        try:
            yield
        except BaseException as error:
            loop.trainers.give_up(error)  # a thread may be sending weights to a server that came back
            raise
        finally:
            loop.producer, loop.trainers.watch = None, others


def _maker(loop: Loop, steps: int, saved: Saved | None) -> Maker:
    rollout, version, cells = loop.config.rollout, loop.fleet.version, loop.objective.composition
    assert loop.grading is not None
    recipe = Recipe(
        samples=rollout.samples_per_prompt,
        sampling=loop.sampling,
        informative=functools.partial(teaches, loop.objective) if cells.dynamic_sampling else None,
        on_failure=loop.config.grading.on_failure,
        least=loop.least_graded,
        most_dropped=rollout.max_sampling_rounds * rollout.prompts_per_step,
        scored=loop.config.checks.scored_rollouts,
        limit_s=rollout.group_limit_s,
    )
    admission = Admission(
        rollout.prompts_per_step,
        rollout.max_staleness,
        rollout.steps_ahead,
        order=rollout.order,
        version=version,
        last=version + steps - 1,
    )
    answers = FleetAnswers(loop.fleet, rollout.interrupt, loop.environments)
    maker = Maker(admission, loop.source, answers, loop.grading.judge(), recipe, loop.teacher)
    if saved is not None:
        maker.restore(saved)
    return maker
