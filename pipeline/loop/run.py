"""`train`: a whole run, from its configuration to its last checkpoint, fresh or resumed, and its end."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.hf.companions import write_companions
from megatron_ext.hf.writer import has_weights
from megatron_ext.lora.peft import peft_problem
from pipeline.checkpoints.best_model import export_best
from pipeline.checkpoints.resume import Start, choose_start
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore, Progress, progress_of
from pipeline.cluster.limits import raise_open_files
from pipeline.config import Config
from pipeline.data.prompts import PromptSource
from pipeline.diagnose.profiles import Profiles
from pipeline.diagnose.stall import StallReports
from pipeline.disk.claim import Claim, claim
from pipeline.disk.lock import refuse_held
from pipeline.disk.scratch import scratch_folder
from pipeline.dumps.steps import DumpedSteps
from pipeline.errors import SamerouteError
from pipeline.evaluation.opened_set import OpenedSet
from pipeline.loop.asynchronous import asynchronous
from pipeline.loop.check_engines import check_first_rollouts
from pipeline.loop.compare import DisagreementError
from pipeline.loop.evaluations import Evaluations
from pipeline.loop.inputs import check_inputs, check_not_replaced, check_prompts, dumped_steps
from pipeline.loop.joining.changes import ServerChanges
from pipeline.loop.loop import Loop
from pipeline.loop.open_loop import open_loop
from pipeline.loop.restarts import Restarts, engine_failed
from pipeline.loop.stop import Stopped, StopRequest
from pipeline.observe.console import Console
from pipeline.observe.device_hours import DeviceHours
from pipeline.observe.facts import write_facts, written_by_this_job
from pipeline.observe.garbled import answer_metrics
from pipeline.observe.long_phase import LongPhases
from pipeline.observe.run_dir import RunDirectory
from pipeline.observe.sinks.sinks import Sinks
from pipeline.observe.stragglers import Stragglers
from pipeline.rollout.saved import Saved
from pipeline.say import to_stderr
from pipeline.step import StepResult
from pipeline.trainer.group import TrainerGroup
from pipeline.trainer.spikes import SpikesError


def train(
    config: Config, from_dump: Path | None = None, *, resume: bool = False, stop: StopRequest | None = None
) -> Path:
    """Run the whole configuration; returns the run directory. Whatever happens, nothing is left running.

    from_dump: a dump, or a directory of them: train on these steps, whatever train.steps says, and start no server.
    resume: go on from the newest checkpoint, and refuse where there is none; see checkpoints.resume.choose_start.
    stop: signals that may ask for the end.
    Where an engine fails and there is a checkpoint, it begins again from that, as often as run.max_restarts says.
    Raises what the CLI turns into a message: DataError, DumpError, ObserveError, VerifierError, ResumeError,
    CheckpointError, RunDirectoryError and ServerError (its port) before anything starts; ServerError, PlacementError,
    TrainerError, WeightTransferError, DumpError, NothingToLearnError, RewardError, DisagreementError, CheckpointError
    and AlertStop after; Stopped where a signal ended the run and it can be resumed, KeyboardInterrupt where it cannot.
    """
    store = CheckpointStore(config.run.directory / "checkpoints", config.checkpoint.keep_last)
    stop = stop or StopRequest(None)
    restarts, spoiled = Restarts(config.run.max_restarts, 60 * config.run.restart_window_minutes), 0
    with _ended_at_once(config, store, stop):
        dumped = None if from_dump is None else dumped_steps(from_dump, config)
        while True:
            refuse_held(config.run.directory)
            check_inputs(config, served=dumped is None and config.train.steps > 0)
            raise_open_files(config)
            try:
                with scratch_folder() as scratch:
                    source, sets = check_prompts(config, scratch)
                    with claim(config.run.directory) as claimed:
                        asked = (source, sets)
                        return _claimed(
                            config, claimed, asked, dumped, store, restarts, resume=resume, stop=stop, spoiled=spoiled
                        )
            except SamerouteError as failure:
                latest = store.latest()
                if not engine_failed(failure) or latest is None or stop.requested:
                    raise
                to_stderr(f"{failure}\n{restarts.again(failure)}, from {latest}")
                resume, spoiled = True, failure.step if isinstance(failure, SpikesError) else 0


def _claimed(
    config: Config,
    claimed: Claim,
    asked: tuple[PromptSource, Sequence[OpenedSet]],
    dumped: DumpedSteps | None,
    store: CheckpointStore,
    restarts: Restarts,
    *,
    resume: bool,
    stop: StopRequest,
    spoiled: int = 0,
) -> Path:
    """The run, in a directory that is its own. asked: its prompts and its evaluations, checked. spoiled: the step that
    an attempt before came to, whose prompts are passed over; 0: none are."""
    source, sets = asked
    start = choose_start(config, store, asked=resume)
    start = None if start is None else start.past(spoiled)
    if start is None:
        check_not_replaced(config)
    steps = range(1, config.train.steps + 1) if dumped is None else dumped.steps
    done, last = 0 if start is None else start.progress.step, max(steps, default=0)
    left = [step for step in steps if step > done]
    with (
        RunDirectory.create(config, resume_after=None if start is None else done, claim=claimed) as run,
        Console(last) as console,
    ):
        removed = [f"removed {name}, which was interrupted" for name in store.clean()] if start is not None else []
        for note in (*claimed.notes, *removed, *(start.notes if start is not None else [])):
            console.say(note)
        if start is not None and not left and has_weights(run.path / "hf"):
            console.say(f"all {last} steps are done; a larger train.steps goes on")
        else:
            write_facts(run.path, data=source.facts())
            _Run(config, store, stop, console, run, last, restarts.count).go(left, start, dumped, source, sets)
        run.finish()
    return run.path


def requeued_attempt(config: Config) -> tuple[Config, bool]:
    """What a later attempt of a Slurm job does: the configuration, and whether to resume.

    It resumes where there is a checkpoint. Where none of its attempts has come to one, it begins anew over what they
    left, and only over that.
    """
    if CheckpointStore(config.run.directory / "checkpoints").latest() is not None:
        return config, True
    if written_by_this_job(config.run.directory):
        config = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": True})})
    return config, False


@contextlib.contextmanager
def _ended_at_once(config: Config, store: CheckpointStore, stop: StopRequest) -> Iterator[None]:
    """A signal that did not wait for the next checkpoint leaves the one before: then the run is Stopped too."""
    try:
        yield
    except KeyboardInterrupt:
        latest = store.latest()
        if stop.at_once and config.checkpoint.every_steps is not None and latest is not None:
            raise Stopped(f"ended by {stop.signal_name}; --resume goes on from {latest}") from None
        raise


class _Run:
    """A run in its directory. last: number of its last step. restarts: attempts before this one."""

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        stop: StopRequest,
        console: Console,
        directory: RunDirectory,
        last: int,
        restarts: int,
    ):
        self.config, self.store, self.stop, self.console = config, store, stop, console
        self.directory, self.last, self.restarts = directory, last, restarts
        self.stragglers = Stragglers(console.say)
        shared = config.cluster.colocated
        self.hours = DeviceHours(config.parallel.ranks, 0, config.cluster.price_per_hour, shared=shared)

    def go(
        self,
        steps: Sequence[int],
        start: Start | None,
        dumped: DumpedSteps | None,
        source: PromptSource,
        sets: Sequence[OpenedSet],
    ) -> None:
        """Both engines up, the steps, the model as a Hugging Face directory."""
        config, directory = self.config, self.directory
        serve = dumped is None and config.train.steps > 0
        phases = LongPhases(self.console.say, directory.logs / "start.log")
        with (
            self.stop.saving(),
            Sinks(config, directory.path, self.console.say) as sinks,
            self.store.in_use(directory.is_ours),
            open_loop(
                config,
                directory.path,
                directory.logs,
                serve=serve,
                start=start,
                source=source,
                on_supervised=self._supervised,
                may_stop=self._supervised_done,
                phases=phases,
            ) as (loop, model_path),
            self._saver(loop.trainers) as saver,
        ):
            write_facts(directory.path, loop.trainers)
            loop.say = self.console.say
            stalled = StallReports.of_run(directory.path, loop.trainers, loop.fleet, self.console.say)
            for waiting in (loop.waiting, loop.trainers.waiting, loop.fleet.members.waits):
                waiting.on_stall(stalled, config.debug.stall_s)
            teaching = 0 if loop.teacher is None else config.teacher_gpus
            self.hours.servers = len(loop.fleet.servers) * config.server.tensor_parallel + teaching
            if config.replay.any and not loop.replay.any:
                self.console.say(
                    f"replay={config.replay} replays nothing: the model has no experts, so there are no routes"
                )
            if serve and config.checks.first_rollouts:
                check_first_rollouts(loop, model_path, directory, self.console, phases)
            self.stop.arm()
            if sets and not serve:
                self.console.say("no set of evaluate is answered: this run starts no server")
            evaluations = self._evaluations(loop, sets if serve else (), start, sinks)
            with (
                asynchronous(loop, len(steps), None if start is None else start.saved),
                ServerChanges(loop, directory.path, self.console.say) as changes,
            ):
                for number in steps:
                    if evaluations.exhausted:
                        self.console.say(f"the run ends here (checkpoint.best.patience): {evaluations.best}")
                        break
                    changes.after(self._step(loop, dumped, number, saver, sinks, evaluations).batch.rollouts)
            saver.wait()  # whatever the last check finds, the last checkpoint is there
            if loop.fleet.version and serve:
                loop.probe()  # a step checks the transfer before it; this one checks the last
            with phases.of("the model is written", loop.trainers.progress):
                loop.trainers.save_hf(directory.hf_directory(model_path, config.precision.weights))
                if config.lora is not None and (problem := peft_problem(loop.shape, config.lora)) is not None:
                    self.console.say(f"no directory for PEFT is written: {problem}; hf/ has the merged model")
                elif config.lora is not None:
                    loop.trainers.save_peft(directory.path / "peft", model_path)

    def _evaluations(self, loop: Loop, sets: Sequence[OpenedSet], start: Start | None, sinks: Sinks) -> Evaluations:
        """Those of the run, with what is due before its next step made."""
        evaluations = Evaluations(
            self.config,
            sets,
            loop.fleet,
            loop.on_servers,
            self.last,
            self.directory,
            self.console.say,
            give_up=lambda: self.stop.signal_name,
            graders=loop.graders,
            attempts=loop.environments,
        )
        done = 0
        if start is not None:
            evaluations.restore(start.progress.evaluations)
            done = start.progress.step
        if metrics := evaluations.after(done):
            sinks.record_beginning(done, metrics)
            if evaluations.better(done, metrics) and start is not None and done:
                self.store.call_best(start.path)
                self._export(loop.trainers)
        return evaluations

    def _step(
        self,
        loop: Loop,
        dumped: DumpedSteps | None,
        number: int,
        saver: Saver,
        sinks: Sinks,
        evaluations: Evaluations,
    ) -> StepResult:
        """One RL step, its evaluations and its records."""
        with self._traced(loop, number):
            result = loop.step(number) if dumped is None else _replay(loop, dumped, number)
        result.metrics.update(answer_metrics(result.batch.rollouts, loop.source.tokenizer))
        result.metrics.update(self.stragglers.step(result))
        result.metrics.update(self.hours.step(result.metrics, sum(r.trained_tokens for r in result.batch.rollouts)))
        began = time.perf_counter()
        scores = evaluations.after(number)
        better = evaluations.better(number, scores)
        if scores:
            result.metrics.update(scores, **{"time/evaluate_s": time.perf_counter() - began})
        if self.config.run.max_restarts:
            result.metrics["run/restarts"] = float(self.restarts)
        self.directory.record(result.metrics)
        self.directory.write_step(result, loop.objective, loop.source.tokenizer)
        self.console.step(result.metrics)
        sinks.record(result.metrics)
        loop.spikes.check(number, self.config.run.rollback_after)
        self._step_done(loop, saver, number, evaluations, save=better)
        if better:
            self._export(loop.trainers)
        return result

    def _traced(self, loop: Loop, number: int) -> contextlib.AbstractContextManager[None]:
        """Around a step that debug.profile may name."""
        profile = self.config.debug.profile
        if profile is None:
            return contextlib.nullcontext()
        return Profiles(profile, self.directory.path, loop.trainers, loop.fleet, self.console.say).of_step(number)

    def _export(self, trainers: TrainerGroup) -> None:
        """The best model so far, to where the configuration wants it."""
        best = self.config.checkpoint.best
        if best is not None and best.export is not None:
            companions = functools.partial(write_companions, self._model, dtype=self.config.precision.weights)
            self.console.say(export_best(best.export, self.directory.path, trainers.save_hf, companions))

    @property
    def _model(self) -> Path:
        """The model directory that the run began with."""
        return self.config.model.path or self.directory.path / "model"

    def _saver(self, trainers: TrainerGroup) -> Saver:
        companions = functools.partial(write_companions, self._model, dtype=self.config.precision.weights)
        return Saver(self.store, self.config.checkpoint, trainers, companions, self.console.say)

    def _supervised(self, number: int, nll: float) -> None:
        self.console.supervised(number, self.config.supervised.steps, nll)

    def _supervised_done(self, number: int, trainers: TrainerGroup, source: PromptSource) -> None:
        """A supervised step. Only a signal saves here; the phase is short."""
        self.stop.arm()
        if self.stop.requested:
            progress = progress_of(self.config, step=0, supervised=number, version=0, cursor=source.state())
            with self._saver(trainers) as saver:
                self._end(saver, progress)

    def _step_done(self, loop: Loop, saver: Saver, number: int, evaluations: Evaluations, *, save: bool) -> None:
        """An RL step, recorded and synchronised. save: whatever checkpoint.every_steps says."""
        saver.poll()
        every = self.config.checkpoint.every_steps
        if loop.spikes.in_a_row and self.config.run.rollback_after is not None and number < self.last:
            save, every = False, None  # what a rollback goes back to is from before the first of them
        due = save or (every is not None and (number % every == 0 or number == self.last or evaluations.exhausted))
        if not (due or self.stop.requested):
            return
        saved = None if loop.producer is None else loop.producer.snapshot()
        if saved is not None:
            self.directory.episodes.add_ended(number, saved.ended, loop.source.tokenizer)
        self.directory.to_disk()
        progress = progress_of(
            self.config,
            step=number,
            supervised=self.config.supervised.steps,
            version=loop.fleet.version,
            cursor=loop.source.state() if saved is None else saved.cursor,
            evaluations=evaluations.state(),
        )
        if self.stop.requested and number < self.last:
            self._end(saver, progress, saved)
        self._save(saver, progress, saved)

    @staticmethod
    def _save(saver: Saver, progress: Progress, saved: Saved | None) -> None:
        if saved is None:
            saver.save(progress)
        else:
            saver.save(progress, saved.write)

    def _end(self, saver: Saver, progress: Progress, saved: Saved | None = None) -> None:
        self._save(saver, progress, saved)
        saver.wait()
        raise Stopped(
            f"ended by {self.stop.signal_name} after {progress.name.replace('_', ' ')}; the same command with --resume "
            f"goes on from {self.store.directory / progress.name}"
        )


def _replay(loop: Loop, dumped: DumpedSteps, number: int) -> StepResult:
    """A step on dumped rollouts. Raises DisagreementError where they were sampled under other weights."""
    try:
        return loop.step(number, dumped.read(number, loop.config, loop.shape))
    except DisagreementError as error:
        raise DisagreementError(
            f"{error}. Or these are not the weights that sampled step {number}: a replay begins with those that the "
            f"dumping run had at step {dumped.steps[0]}, and another configuration leads to others from step to step"
        ) from error
