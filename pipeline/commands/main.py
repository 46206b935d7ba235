"""The command `sameroute`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands import launch
from pipeline.commands.convert import ConvertError, add_arguments
from pipeline.commands.convert import run as convert
from pipeline.errors import SamerouteError
from pipeline.imports import lasting_imports
from pipeline.plan.arguments import add_arguments as add_plan_arguments

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.loop.stop import StopRequest

TO_BE_RESUMED = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 the command or its configuration is wrong, 3 diagnose found that the
    engines disagree, 75 ended by a signal and to be resumed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="sameroute", description="Reinforcement learning for mixture-of-experts language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a configuration: supervised steps, then reinforcement learning")
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    train.add_argument(
        "--from-dump",
        type=Path,
        metavar="PATH",
        help="train on the steps that a run with debug.dump_rollouts=true left in this directory, or on one of its "
        "files; no server is started, and train.steps does not count",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the run directory, and refuse where there is none. Without it, a run "
        "with checkpoints is resumed if run.overwrite is false, and deleted if that is true",
    )
    train.add_argument(
        "--requeued",
        action="store_true",
        help="this is a later attempt of a Slurm job: resume as --resume does, or begin anew where no attempt of the "
        "job has come to its first checkpoint",
    )
    diagnose = commands.add_parser("diagnose", help="why trainer and server disagree, by exchanging one part at a time")
    diagnose.add_argument("config", type=Path, help="YAML file of the run")
    diagnose.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    diagnose.add_argument(
        "--rollouts", type=Path, metavar="DUMP", help="a dumped step whose rollouts are compared, in place of new ones"
    )
    diagnose.add_argument(
        "--out", type=Path, help="directory of diagnose.html and diagnose.json; default: run.directory with -diagnose"
    )
    objectives = commands.add_parser("objectives", help="the table of objectives, or one with its equation")
    objectives.add_argument("name", nargs="?", help="a preset of the table")
    report = commands.add_parser("report", help="figures of a finished or running run, in one HTML file")
    report.add_argument("run", type=Path, help="run directory; report.html is written into it")
    add_arguments(commands.add_parser("convert", help="Hugging Face directories and Megatron-Core checkpoints"))
    launch.add_arguments(commands.add_parser("launch", help="submit a configuration to a cluster"))
    plan = commands.add_parser("plan", help="whether a configuration fits its machines, and how long a step takes")
    add_plan_arguments(plan)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides before the first option only; they may stand anywhere.
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    commands_by_name = {
        "train": _train,
        "diagnose": _diagnose,
        "objectives": _objectives,
        "report": _report,
        "convert": _convert,
        "launch": _launch,
        "plan": _plan,
    }
    return commands_by_name[options.command](options)


def _train(options: argparse.Namespace) -> int:
    def run(config: Config, stop: StopRequest) -> int:
        with lasting_imports():
            from pipeline.checkpoints.store import CheckpointStore
            from pipeline.loop.run import train
            from pipeline.observe.facts import written_by_this_job

        resume = options.resume
        if options.requeued:
            resume = CheckpointStore(config.run.directory / "checkpoints").latest() is not None
            if not resume and written_by_this_job(config.run.directory):
                config = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": True})})
        print(f"run directory: {train(config, options.from_dump, resume=resume, stop=stop)}")
        return 0

    return _with_engines(options, run)


def _diagnose(options: argparse.Namespace) -> int:
    def run(config: Config, stop: StopRequest) -> int:
        from pipeline.commands.diagnose import run as diagnose

        directory = config.run.directory
        out = options.out or directory.with_name(f"{directory.name}-diagnose")
        return 0 if diagnose(config, out, options.rollouts).agree else 3

    return _with_engines(options, run)


def _with_engines(options: argparse.Namespace, run: Callable[[Config, StopRequest], int]) -> int:
    """Load the configuration and run; what goes wrong becomes a message and an exit code."""
    from pipeline.config import ConfigError, load_config

    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        return _fail(str(error), 2)

    with lasting_imports():
        from pipeline.checkpoints.resume import ResumeError
        from pipeline.checkpoints.store import CheckpointError, CheckpointStore
        from pipeline.cluster.placement import PlacementError
        from pipeline.data.prompts import DataError
        from pipeline.dumps.dump import DumpError
        from pipeline.engine.server import ServerError
        from pipeline.loop.compare import DisagreementError
        from pipeline.loop.loop import NothingToLearnError
        from pipeline.loop.stop import Stopped, StopRequest
        from pipeline.observe.run_dir import RunDirectoryError
        from pipeline.observe.sinks.alerts import AlertStop
        from pipeline.observe.sinks.sinks import ObserveError
        from pipeline.rewards import RewardError
        from pipeline.trainer.group import TrainerError
        from pipeline.weights import WeightTransferError

    checkpoints = config.checkpoint.every_steps is not None
    stop = StopRequest(config.checkpoint.grace_s if checkpoints else None)
    stop.listen()
    try:
        return run(config, stop)
    except Stopped as error:
        return _fail(str(error), TO_BE_RESUMED)
    except (
        RunDirectoryError,
        ConfigError,
        DataError,
        DumpError,
        ObserveError,
        ResumeError,
        FileNotFoundError,
    ) as error:
        return _fail(str(error), 2)
    except (
        ServerError,
        PlacementError,
        TrainerError,
        RewardError,
        WeightTransferError,
        DisagreementError,
        NothingToLearnError,
        CheckpointError,
        AlertStop,
    ) as error:
        return _fail(str(error), 1)
    except SamerouteError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        latest = CheckpointStore(config.run.directory / "checkpoints").latest()
        if options.command == "train" and stop.at_once and checkpoints and latest is not None:
            return _fail(f"ended by {stop.signal_name}; --resume goes on from {latest}", TO_BE_RESUMED)
        return _fail("interrupted", 130)


def _objectives(options: argparse.Namespace) -> int:
    from pipeline.objectives.describe import describe, describe_all

    if options.name is None:
        print(describe_all())
        return 0
    try:
        print(describe(options.name))
    except KeyError as error:
        return _fail(str(error.args[0]), 2)
    return 0


def _report(options: argparse.Namespace) -> int:
    from pipeline.observe.report.page import write_report
    from pipeline.observe.report.run import ReportError

    try:
        print(write_report(options.run))
    except ReportError as error:
        return _fail(str(error), 2)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from pipeline.commands.plan import plan_command
    from pipeline.config import ConfigError

    try:
        return plan_command(options)
    except ConfigError as error:
        return _fail(str(error), 2)


def _convert(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if text := convert(options):
            print(text)
    except ConvertError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _launch(options: argparse.Namespace) -> int:
    try:
        print(launch.run(options))
    except launch.LaunchError as error:
        return _fail(str(error), error.code)
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(f"sameroute: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
