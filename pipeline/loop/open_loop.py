"""A loop ready for its first step: both engines up, the trainer where the run begins or goes on, its weights sent."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_ext.hf.description import read_description
from pipeline.checkpoints.resume import Start
from pipeline.config import Config
from pipeline.data.prompts import PromptSource
from pipeline.disk.scratch import scratch_folder
from pipeline.environments.loading import open_environments
from pipeline.loop.engines import start_engines
from pipeline.loop.inputs import prepare_model, prompt_source
from pipeline.loop.loop import Loop, supervise
from pipeline.loop.teaching.teacher_model import teacher_directory
from pipeline.objectives import resolve
from pipeline.observe.long_phase import LongPhases
from pipeline.rollout.grading import OwnGraders
from pipeline.rollout.teacher import Teacher
from pipeline.trainer.group import TrainerGroup

_ALLOCATIONS = 10_000  # after which the collector looks at the newest objects, in place of 700
OnSupervised = Callable[[int, float], None]
MayStop = Callable[[int, TrainerGroup, PromptSource], None]


@contextlib.contextmanager
def open_loop(
    config: Config,
    directory: Path,
    logs: Path,
    *,
    serve: bool = True,
    start: Start | None = None,
    source: PromptSource | None = None,
    on_supervised: OnSupervised = lambda *_: None,
    may_stop: MayStop = lambda *_: None,
    phases: LongPhases | None = None,
) -> Iterator[tuple[Loop, Path]]:
    """Server, Ray and trainer ranks up, supervised steps done, weights synchronised: a loop ready for its first step.

    directory: where a tiny model and dumps are written. logs: existing folder for the logs of both engines.
    serve: false starts no server, for a loop that replays.
    start: a checkpoint to go on from.
    source: the prompts, where they have been read already.
    on_supervised: called with each supervised step and its loss, nats a token.
    may_stop: called after it with its number and with what would have to be saved.
    phases: tell what takes long before the first step; None: nobody is told.
    Yields the loop and the model directory it started from.
    Raises DataError, ServerError, PlacementError and TrainerError.
    """
    phases = phases or LongPhases()
    model_path = prepare_model(config, directory / "model")
    shape = read_description(model_path)
    source = source or prompt_source(config, model_path)
    # Not the draws of the first steps again after a resumption.
    seed = config.run.seed + (0 if start is None else start.progress.step)
    with (
        _one_thread(),
        scratch_folder(),
        teacher_directory(config, serve=serve) as teacher,
        open_environments(config.environment if serve else None, source.tokenizer, source.stop_token_ids) as leads,
        start_engines(config, model_path, shape, logs, serve=serve, seed=seed, teacher=teacher) as engines,
        contextlib.ExitStack() as stack,
    ):
        graders = engines.graders or OwnGraders(source.tokenizer)
        # Verifiers are loaded while the engines load.
        grading = stack.enter_context(graders.open(config.rewards, config.grading)) if serve else None
        trainers, fleet = engines.trainers, engines.fleet
        beside = teacher if config.teacher is not None and config.teacher.engine == "trainer" else None
        if config.cluster.colocated and fleet.serves:
            with phases.of("the servers load the model"):
                engines.take_turns()
        _prepare_trainers(config, model_path, beside, trainers, source, start, on_supervised, may_stop, phases)
        if fleet.serves:
            with phases.of("the servers load the model"):
                engines.connect()
        in_loop = start is not None and start.progress.step > 0
        if start is not None and in_loop:
            fleet.begin_at(start.progress.version)
        differ = in_loop or config.supervised.steps or config.precision.rollout_weights != "same"
        if config.cluster.colocated and not differ:
            fleet.begin_at(0)  # those that the servers began with went with their memory
        if config.cluster.colocated or differ:
            with phases.of("the first transfer of the weights", trainers.progress):
                fleet.transfer(trainers)
        loop = Loop(config, shape, source, fleet, trainers, directory / "dumps", grading=grading, graders=graders)
        loop.environments = leads
        if engines.teacher is not None:
            loop.teacher = Teacher(engines.teacher, loop.objective.composition.teacher_top)
        with _lasting_objects():
            yield loop, model_path
        trainers.close()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch of this process computes on one thread: its arrays are small, and an operator that threads share waits for
    a core which an engine has. Metrics over 256 x 256 tokens are 2 ms of work, and took 200 ms where a server's core
    was theirs too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _lasting_objects() -> Iterator[None]:
    """What exists now, 300,000 objects of imports, is no garbage: each step made Python's collector walk through them
    again, a third of the controller's work of a step of short answers."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _prepare_trainers(
    config: Config,
    model_path: Path,
    teacher: Path | None,
    trainers: TrainerGroup,
    source: PromptSource,
    start: Start | None,
    on_supervised: OnSupervised,
    may_stop: MayStop,
    phases: LongPhases,
) -> None:
    """Build the model on every rank, and bring it and the prompts to where the first RL step begins. teacher: the
    directory of one that the ranks hold too."""
    objective = resolve(config.objective)
    with phases.of("the trainer loads the model", trainers.progress):
        trainers.build(
            model_path,
            config.trainer,
            config.supervised,
            replay=config.replay.any,
            precision=config.precision,
            critic=config.critic if objective.needs_critic else None,
            reference=objective.needs_reference,
            teacher=None if teacher is None else str(teacher.resolve()),
            seed=config.run.seed,
            load_weights=start is None,
            lora=config.lora,
        )
    if start is not None:
        if start.progress.step:
            trainers.restart_optimizer(config.train)
        with phases.of("the trainer reads the checkpoint"):
            trainers.resume(start.path)
        source.restore(start.progress.cursor)
        if start.pass_over:
            source.take(start.pass_over * config.rollout.prompts_per_step)
        if start.progress.step:
            return
    done = 0 if start is None else start.progress.supervised
    for number, nll in supervise(config, source, trainers, done):
        on_supervised(number, nll)
        may_stop(number, trainers, source)
    trainers.restart_optimizer(config.train)
    if objective.needs_reference:
        trainers.keep_reference()
