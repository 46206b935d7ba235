"""`sameroute diagnose CONFIG`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.config_arguments import add_config
from pipeline.errors import DISAGREEMENT
from pipeline.imports import lasting_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_config(parser)
    parser.add_argument(
        "--rollouts", type=Path, metavar="DUMP", help="a dumped step whose rollouts are compared, in place of new ones"
    )
    parser.add_argument(
        "--nan",
        type=Path,
        metavar="DUMP",
        help="in place of the comparison: pass a dumped step through the trainer and name the first module, layer, "
        "expert and rank whose output is not finite",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="with --nan: the weights, RUN/checkpoints/step_N; default: model.path"
    )
    parser.add_argument(
        "--out", type=Path, help="directory of diagnose.html and diagnose.json; default: run.directory with -diagnose"
    )


def run(options: argparse.Namespace) -> int:
    """0 where the engines agree, or all is finite, DISAGREEMENT where not. Raises a SamerouteError."""
    from pipeline.config import load_config

    config = load_config(options.config, options.overrides, served=True)
    with lasting_imports():
        from pipeline.loop.check_engines import diagnose_config, find_not_finite
        from pipeline.loop.stop import StopRequest

    StopRequest.of_run(config.checkpoint)
    directory = config.run.directory
    out = options.out or directory.with_name(f"{directory.name}-diagnose")
    if options.nan is not None:
        return DISAGREEMENT if find_not_finite(config, out, options.nan, options.checkpoint) else 0
    return 0 if diagnose_config(config, out, options.rollouts).agree else DISAGREEMENT
