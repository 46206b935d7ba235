"""`sameroute evaluate CONFIG`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.config_arguments import add_config
from pipeline.imports import lasting_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_config(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="of a run, as RUN/checkpoints/step_200 or RUN/checkpoints/best"
    )
    which.add_argument("--model", type=Path, metavar="HF_DIR", help="a Hugging Face directory; default: the config's")
    parser.add_argument("--set", dest="sets", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of evaluation.json, .html and answers; default: run.directory with -evaluate",
    )


def run(options: argparse.Namespace) -> int:
    """0, and a table is printed. Raises a SamerouteError."""
    from pipeline.config import ConfigError, load_config

    model = options.checkpoint or options.model
    config = load_config(options.config, options.overrides, served=True)
    names = [one.name for one in config.evaluate]
    if wrong := [name for name in options.sets or () if name not in names]:
        raise ConfigError(f"there is no set {wrong[0]!r} under evaluate; there are {', '.join(names) or 'none'}")
    if options.sets:
        config = config.model_copy(update={"evaluate": tuple(s for s in config.evaluate if s.name in options.sets)})
    if not names:
        raise ConfigError("the configuration names no set to evaluate; write one, as evaluate: [{name: test, ...}]")
    if model is not None and not model.is_dir():
        raise ConfigError(f"there is no directory {model}")
    with lasting_imports():
        from pipeline.evaluation.page import table
        from pipeline.loop.evaluate_config import evaluate_config
        from pipeline.loop.stop import StopRequest

    StopRequest.of_run(config.checkpoint)
    directory = config.run.directory
    out = options.out or directory.with_name(f"{directory.name}-evaluate")
    found = evaluate_config(config, out, model)
    print(table(found))
    print(out / "evaluation.html")
    return 0
