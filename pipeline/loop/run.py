"""Everything that a run needs is started here, and nothing of it is left when the block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from megatron_ext.hf.description import model_shape, read_hf_config
from megatron_ext.hf.files import copy_companions
from pipeline.checkpoints.resume import Start, choose_start
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore, Progress, progress_of
from pipeline.config import Config, ConfigError
from pipeline.data.chat import DataError
from pipeline.data.prompts import PromptSource
from pipeline.data.tiny_model import make_tiny_model
from pipeline.diagnose import diagnose
from pipeline.diagnose.bench import new_rollouts
from pipeline.diagnose.page import write_page
from pipeline.disk.claim import Claim, claim
from pipeline.disk.lock import refuse_held
from pipeline.disk.scratch import scratch_folder
from pipeline.dumps.dump import DumpError
from pipeline.dumps.steps import DumpedSteps
from pipeline.engine.client import SGLangClient
from pipeline.engine.pool import ClientPool
from pipeline.engine.server import SGLangServer, reserve_port
from pipeline.loop.compare import DisagreementError
from pipeline.loop.engines import cluster, server_count, trainer_group, weights_config
from pipeline.loop.limits import raise_open_files
from pipeline.loop.loop import Loop, supervise
from pipeline.loop.stop import Stopped, StopRequest
from pipeline.objectives import resolve
from pipeline.observe.console import Console
from pipeline.observe.facts import write_facts
from pipeline.observe.run_dir import RunDirectory
from pipeline.observe.sinks.sinks import Sinks, check_sinks
from pipeline.rewards import resolve_reward
from pipeline.trainer.group import TrainerGroup
from pipeline.trainer.hf_output import has_weights
from pipeline.types import StepResult


def train(
    config: Config, from_dump: Path | None = None, *, resume: bool = False, stop: StopRequest | None = None
) -> Path:
    """Run the whole configuration; returns the run directory. Whatever happens, nothing is left running.

    from_dump: a dump, or a directory of them: train on these steps, whatever train.steps says, and start no server.
    resume: go on from the newest checkpoint, and refuse where there is none; see checkpoints.resume.choose_start.
    stop: signals that may ask for the end.
    Raises what the CLI turns into a message: DataError, DumpError, ObserveError, RewardError, ResumeError,
    CheckpointError, RunDirectoryError and ServerError (its port) before anything starts; ServerError, TrainerError,
    WeightTransferError, DumpError, NothingToLearnError, DisagreementError, CheckpointError and AlertStop after; Stopped
    where a signal ended the run.
    """
    dumped = None if from_dump is None else _dumped_steps(from_dump, config)
    refuse_held(config.run.directory)
    check_inputs(config)
    raise_open_files(config)
    stop = stop or StopRequest(None)
    with scratch_folder() as scratch:
        source = check_prompts(config, scratch)
        with claim(config.run.directory) as claimed:
            return _claimed(config, claimed, source, dumped, resume=resume, stop=stop)


def _claimed(
    config: Config,
    claimed: Claim,
    source: PromptSource,
    dumped: DumpedSteps | None,
    *,
    resume: bool,
    stop: StopRequest,
) -> Path:
    """The run, in a directory that is its own. source: its prompts, checked."""
    store = CheckpointStore(config.run.directory / "checkpoints", config.checkpoint.keep_last)
    start = choose_start(config, store, asked=resume)
    steps = range(1, config.train.steps + 1) if dumped is None else dumped.steps
    last = max(steps, default=0)
    done = 0 if start is None else start.progress.step
    steps = [step for step in steps if step > done]
    with (
        RunDirectory.create(config, resume_after=None if start is None else done, claim=claimed) as run,
        Console(last) as console,
    ):
        removed = [f"removed {name}, which was interrupted" for name in store.clean()] if start is not None else []
        for note in (*claimed.notes, *removed, *(start.notes if start is not None else [])):
            console.say(note)
        if start is not None and not steps and has_weights(run.path / "hf"):
            console.say(f"all {last} steps are done; a larger train.steps goes on")
            run.finish()
            return run.path
        write_facts(run.path)
        serve = dumped is None and config.train.steps > 0
        session = _Session(config, store, stop, console, run)
        with (
            stop.saving(),
            Sinks(config, run.path, console.say) as sinks,
            open_loop(
                config,
                run.path,
                run.logs,
                serve=serve,
                start=start,
                source=source,
                on_supervised=session.supervised,
                may_stop=session.supervised_done,
            ) as (loop, model_path),
            session.saver(loop.trainers) as saver,
        ):
            write_facts(run.path, loop.trainers)
            if serve and config.checks.first_rollouts:
                _check_engines(loop, model_path, run, console)
            stop.arm()
            for number in steps:
                result = loop.step(number) if dumped is None else _replay(loop, dumped, number)
                run.record(result.metrics)
                run.write_step(result, loop.objective, loop.source.tokenizer)
                console.step(result.metrics)
                sinks.record(result.metrics)
                session.step_done(loop, saver, number, last)
            saver.wait()  # whatever the last check finds, the last checkpoint is there
            if loop.version and serve:
                loop.probe()  # a step checks the transfer before it; this one checks the last
            loop.trainers.call("save_hf", str(run.hf_directory(model_path).resolve()))
        run.finish()
    return run.path


class _Session:
    """What happens between steps: checkpoints, and the end where a signal asked for it."""

    def __init__(self, config: Config, store: CheckpointStore, stop: StopRequest, console: Console, run: RunDirectory):
        self.config, self.store, self.stop, self.console, self.run = config, store, stop, console, run

    def saver(self, trainers: TrainerGroup) -> Saver:
        model = self.config.model.path or self.run.path / "model"
        return Saver(
            self.store, self.config.checkpoint, trainers, lambda hf: copy_companions(model, hf), self.console.say
        )

    def supervised(self, number: int, nll: float) -> None:
        self.console.supervised(number, self.config.supervised.steps, nll)

    def supervised_done(self, number: int, trainers: TrainerGroup, source: PromptSource) -> None:
        """A supervised step. Only a signal saves here; the phase is short."""
        self.stop.arm()
        if self.stop.requested:
            progress = progress_of(self.config, step=0, supervised=number, version=0, cursor=source.state())
            with self.saver(trainers) as saver:
                self._end(saver, progress)

    def step_done(self, loop: Loop, saver: Saver, number: int, last: int) -> None:
        """An RL step, recorded and synchronised."""
        saver.poll()
        every = self.config.checkpoint.every_steps
        due = every is not None and (number % every == 0 or number == last)
        if not (due or self.stop.requested):
            return
        self.run.to_disk()
        progress = progress_of(
            self.config,
            step=number,
            supervised=self.config.supervised.steps,
            version=loop.version,
            cursor=loop.source.state(),
        )
        if self.stop.requested and number < last:
            self._end(saver, progress)
        saver.save(progress)

    def _end(self, saver: Saver, progress: Progress) -> None:
        saver.save(progress)
        saver.wait()
        raise Stopped(
            f"ended by {self.stop.signal_name} after {progress.name.replace('_', ' ')}; the same command with --resume "
            f"goes on from {self.store.directory / progress.name}"
        )


def _check_engines(loop: Loop, model_path: Path, run: RunDirectory, console: Console) -> None:
    """Compare the engines on a few rollouts. Raises DisagreementError with the diagnosis where they disagree."""
    rollouts = new_rollouts(loop, loop.config.checks.first_rollouts, max_new_tokens=64)
    found = diagnose(loop, model_path, rollouts, in_full=False)
    found.write_json(run.path / "diagnose.json")
    if not found.agree:
        write_page(found, run.path / "diagnose.html", name=run.path.name)
        raise DisagreementError(f"{found.sentence} See {run.path / 'diagnose.html'}")
    console.say(found.sentence)


def config_device(config: Config) -> Literal["cpu", "cuda"]:
    """Of both engines."""
    return config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def check_inputs(config: Config) -> None:
    """What can be known to be wrong before an earlier run is written over: sinks, the verifier, the data file, the
    port, a precision that this device does not have."""
    check_sinks(config)
    try:
        config.precision.check_device(config_device(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    resolve_reward(config.data.reward)
    if config.data.path is not None and not config.data.path.is_file():
        raise DataError(f"there is no data file {config.data.path}")
    reserve_port(config.server.host, config.server.port)


def check_prompts(config: Config, scratch: Path) -> PromptSource:
    """The prompts of the run: tokenizer, chat template, end-of-sequence token and every line of a data file are read,
    and its first prompts looked at, before a run directory is touched. scratch: for a tiny model's tokenizer.

    Raises DataError.
    """
    model_path = prepare_model(config, scratch / "model")
    model_shape(read_hf_config(model_path))
    source = PromptSource(config.data, model_path, seed=config.run.seed)
    beginning = source.state()
    source.take(config.rollout.prompts_per_step)
    if config.supervised.steps:
        source.take_supervised(config.supervised.batch_size)
    source.restore(beginning)
    return source


def _dumped_steps(path: Path, config: Config) -> DumpedSteps:
    run = config.run.directory.resolve()
    if path.resolve().is_relative_to(run):
        raise DumpError(f"{path} lies in run.directory={config.run.directory}; set run.directory to another path")
    return DumpedSteps(path)


def _replay(loop: Loop, dumped: DumpedSteps, number: int) -> StepResult:
    """A step on dumped rollouts. Raises DisagreementError where they were sampled under other weights."""
    try:
        return loop.step(number, dumped.read(number, loop.config, loop.shape))
    except DisagreementError as error:
        raise DisagreementError(
            f"{error}. Or these are not the weights that sampled step {number}: a replay begins with those that the "
            f"dumping run had at step {dumped.steps[0]}, and another configuration leads to others from step to step"
        ) from error


@contextlib.contextmanager
def open_loop(
    config: Config,
    directory: Path,
    logs: Path,
    *,
    serve: bool = True,
    start: Start | None = None,
    source: PromptSource | None = None,
    on_supervised: Callable[[int, float], None] = lambda *_: None,
    may_stop: Callable[[int, TrainerGroup, PromptSource], None] = lambda *_: None,
) -> Iterator[tuple[Loop, Path]]:
    """Server, Ray and trainer ranks up, supervised steps done, weights synchronised: a loop ready for its first step.

    directory: where a tiny model and dumps are written. logs: existing folder for the logs of both engines.
    serve: false starts no server, for a loop that replays.
    start: a checkpoint to go on from.
    source: the prompts, where they have been read already.
    on_supervised: called with each supervised step and its loss, nats a token.
    may_stop: called after it with its number and with what would have to be saved.
    Yields the loop and the model directory it started from.
    """
    device = config_device(config)
    model_path = prepare_model(config, directory / "model")
    shape = model_shape(read_hf_config(model_path))
    source = source or PromptSource(config.data, model_path, seed=config.run.seed)
    objective = resolve(config.objective)
    routes = config.replay.of_model(shape.num_experts).from_server
    gpus = max(1, torch.cuda.device_count()) if device == "cuda" else 0
    count = server_count(config, gpus) if serve else 0
    local = [
        SGLangServer(
            config.server,
            model_path,
            logs / ("sglang.log" if count == 1 else f"sglang_{number}.log"),
            device=device,
            # Another draw for each server, and not those of the first steps again after a resumption.
            seed=config.run.seed + number + (0 if start is None else start.progress.step),
            return_routed_experts=routes,
            precision=config.precision,
        )
        for number in range(count)
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(scratch_folder())
        servers, nodes = stack.enter_context(cluster(config, local, gpus))
        trainers = stack.enter_context(trainer_group(config, device, logs, servers, nodes))
        trainers.build(
            model_path,
            config.trainer,
            config.supervised,
            replay=config.replay.any,
            precision=config.precision,
            critic=config.critic if objective.needs_critic else None,
            reference=objective.needs_reference,
            seed=config.run.seed,
            load_weights=start is None,
        )
        in_loop = start is not None and start.progress.step > 0
        if in_loop:
            trainers.restart_optimizer(config.train)
        if start is not None:
            trainers.call("resume", str(start.path.resolve()))
            source.restore(start.progress.cursor)
        if not in_loop:
            done = 0 if start is None else start.progress.supervised
            for number, nll in supervise(config, source, trainers, done):
                on_supervised(number, nll)
                may_stop(number, trainers, source)
            trainers.restart_optimizer(config.train)
            if objective.needs_reference:
                trainers.call("keep_reference")
        client = None
        if serve:
            for server in servers:
                server.wait_ready()
            clients = [
                SGLangClient(
                    server.url,
                    vocab_size=shape.vocab_size,
                    num_layers=shape.num_layers,
                    topk=shape.topk,
                    num_experts=shape.num_experts,
                    moe_layers=shape.moe_layers,
                    routes=routes,
                    timeout_s=config.rollout.timeout_s,
                    log_path=server.log_path,
                )
                for server in servers
            ]
            client = clients[0] if len(clients) == 1 else ClientPool(clients)
            urls, logs_of_servers = [s.url for s in servers], [s.log_path for s in servers]
            weights = weights_config(config, gpus)
            trainers.connect(urls, weights, device, logs_of_servers, config.precision.rollout_weights)
        loop = Loop(config, shape, source, client, trainers, dumps=directory / "dumps")
        if start is not None and in_loop:
            loop.version = start.progress.version - 1  # which the sync makes good
        if in_loop or config.supervised.steps or config.precision.rollout_weights != "same":
            loop.sync()
        yield loop, model_path
        trainers.call("close")


def prepare_model(config: Config, directory: Path) -> Path:
    """The Hugging Face directory to start from: the configured one, or a tiny one made at `directory`."""
    if config.model.path is not None:
        return config.model.path
    assert config.model.tiny is not None
    return make_tiny_model(directory, config.model.tiny, config.run.seed)
