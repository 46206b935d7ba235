"""`sameroute train CONFIG`."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.config_arguments import add_config
from pipeline.imports import lasting_imports

if TYPE_CHECKING:
    from pipeline.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_config(parser)
    parser.add_argument(
        "--from-dump",
        type=Path,
        metavar="PATH",
        help="train on the steps that a run with debug.dump_rollouts=true left in this directory, or on one of its "
        "files; no server is started, and train.steps does not count",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the run directory, and refuse where there is none. Without it, a run "
        "with checkpoints is resumed if run.overwrite is false, and deleted if that is true",
    )
    parser.add_argument(
        "--requeued",
        action="store_true",
        help="this is a later attempt of a Slurm job: resume as --resume does, or begin anew where no attempt of the "
        "job has come to its first checkpoint",
    )


def run(options: argparse.Namespace) -> int:
    """0. Raises a SamerouteError, or KeyboardInterrupt where a signal ended what cannot be resumed."""
    from pipeline.config import load_config

    config = load_config(options.config, options.overrides, served=False if options.from_dump else None)
    _check_files(config, options.from_dump)
    with _importing(config) if options.from_dump is None else nullcontext():
        with lasting_imports():
            from pipeline.loop.run import requeued_attempt, train
            from pipeline.loop.stop import StopRequest

        resume = options.resume
        if options.requeued:
            config, resume = requeued_attempt(config)
        stop = StopRequest.of_run(config.checkpoint)
        print(f"run directory: {train(config, options.from_dump, resume=resume, stop=stop)}")
    return 0


def _importing(config: Config) -> AbstractContextManager[None]:
    """Where servers will be started here on a CPU, their imports begin beside those of this process."""
    if config.device != "cpu" or config.cluster.address is not None or not config.train.steps:
        return nullcontext()
    from pipeline.cluster.threads import with_threads
    from pipeline.config.load_config import model_of
    from pipeline.engine.inside.preloaded import importing

    return importing(with_threads(config, model_of(config), "cpu").server)


def _check_files(config: Config, from_dump: Path | None) -> None:
    """Whether the files that the command names are there: known before the imports of a run, which take seconds.

    `train` looks again, and into them. Raises DataError and DumpError.
    """
    if from_dump is not None and not from_dump.exists():
        from pipeline.dumps.groups import DumpError

        raise DumpError(f"there is no dump {from_dump}")
    if (missing := config.missing_file) is not None:
        from pipeline.config.data import not_read
        from pipeline.data.chat import DataError

        raise DataError(not_read(missing))
