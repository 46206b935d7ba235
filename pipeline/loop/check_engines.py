"""Whether the two engines compute the same: a short form before a run's first step, and in full for `sameroute
diagnose`, on engines that are up as a run would have them."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoints.resume import Start
from pipeline.checkpoints.store import read_progress
from pipeline.config import Config
from pipeline.config.replay import Replay
from pipeline.diagnose import diagnose
from pipeline.diagnose.bench import new_rollouts
from pipeline.diagnose.diagnosis import Diagnosis
from pipeline.diagnose.not_finite import where_not_finite
from pipeline.diagnose.page import write_page
from pipeline.dumps.steps import DumpedSteps
from pipeline.loop.compare import DisagreementError
from pipeline.loop.inputs import check_inputs
from pipeline.loop.loop import Loop
from pipeline.loop.open_loop import open_loop
from pipeline.observe.console import Console
from pipeline.observe.long_phase import LongPhases
from pipeline.observe.run_dir import RunDirectory

_NAMED = 10  # tensors named in an error


def check_first_rollouts(loop: Loop, model_path: Path, run: RunDirectory, console: Console, phases: LongPhases) -> None:
    """Compare the engines, their weights by name first and then a few rollouts. Raises DisagreementError with the
    diagnosis where they disagree."""
    with phases.of("the weights of both engines are compared by name", loop.trainers.progress):
        check_first_weights(loop)
    count = loop.config.checks.first_rollouts
    with phases.of(f"{count} answers are sampled, to compare the engines on"):
        rollouts = new_rollouts(loop, count, max_new_tokens=64)
    found = diagnose(loop, model_path, rollouts, in_full=False, phases=phases)
    found.write_json(run.path / "diagnose.json")
    if not found.agree:
        write_page(found, run.path / "diagnose.html", name=run.path.name)
        raise DisagreementError(f"{found.sentence} See {run.path / 'diagnose.html'}")
    console.say(found.sentence)


def check_first_weights(loop: Loop) -> None:
    """Compare what the servers have loaded with what the trainer has, name by name: a server leaves out what it has no
    place for, and every token would show it, but not where it comes from. Nothing is compared where the trainer's have
    been sent already, and compared then, and where weights.checksum_every says so.

    Raises DisagreementError with the names.
    """
    config = loop.config
    if not loop.fleet.serves or loop.fleet.version or config.weights.checksum_every == 0:
        return
    if wrong := loop.trainers.weight_differences():
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise DisagreementError(
            f"the servers do not hold the model that the trainer holds: {', '.join(map(str, wrong[:_NAMED]))}{more}"
        )


def diagnose_config(config: Config, out: Path, dump: Path | None = None) -> Diagnosis:
    """Diagnose a configuration; writes diagnose.json, diagnose.html and logs/ into `out`. Nothing is left running.

    dump: a step that a run with debug.dump_rollouts wrote, or a directory of them, of which the first counts; its
          rollouts in the place of new ones. They should be of the weights that the configuration begins with.
    Raises what `train` raises.
    """
    dumped = None if dump is None else DumpedSteps(dump)
    check_inputs(config)
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with Console(0) as console:
        phases = LongPhases(console.say, logs / "start.log")
        with open_loop(
            _with_routes(config),
            out,
            logs,
            on_supervised=lambda number, nll, *_: console.supervised(number, config.supervised.steps, nll),
            phases=phases,
        ) as (loop, model_path):
            if dumped is None:
                with phases.of("answers are sampled, to compare the engines on"):
                    rollouts = new_rollouts(loop, config.checks.probe_rollouts)
            else:
                step = dumped.read(dumped.steps[0], config, loop.shape)
                rollouts = step.batch.rollouts
            found = diagnose(loop, model_path, rollouts, replay=config.replay, phases=phases)
        found.write_json(out / "diagnose.json")
        write_page(found, out / "diagnose.html", name=str(config.run.directory))
        console.say(found.sentence)
        console.say(f"{out / 'diagnose.html'}, {out / 'diagnose.json'}")
    return found


def find_not_finite(config: Config, out: Path, dump: Path, checkpoint: Path | None = None) -> bool:
    """Pass a dumped step through the trainer and say where the first number that is not finite comes from; whether
    there is one. No server is started, and nothing is left running.

    dump: as for `diagnose_config`. checkpoint: of the weights; None: those that the configuration begins with.
    Raises what `train` raises.
    """
    dumped = DumpedSteps(dump)
    start = None if checkpoint is None else Start(checkpoint, read_progress(checkpoint), [])
    config = config.model_copy(update={"supervised": config.supervised.model_copy(update={"steps": 0})})
    check_inputs(config, served=False)
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with Console(0) as console, open_loop(config, out, logs, serve=False, start=start) as (loop, _):
        step = dumped.read(dumped.steps[0], config, loop.shape)
        loop.load(step.batch.rollouts)
        found = loop.trainers.not_finite()
        console.say(where_not_finite(found))
    return any(found)


def _with_routes(config: Config) -> Config:
    """The same with routes beside the rollouts, where the trainer can take them; else as it is."""
    try:
        config.trainer.check_replay()
    except ValueError:
        return config
    return config.model_copy(update={"replay": Replay.R3})
