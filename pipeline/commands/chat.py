"""`sameroute chat RUN`: a conversation with a checkpoint, on the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.imports import lasting_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="as best or step_200; default: the trained model, else the newest checkpoint",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt; default: the run's")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer, tokens; default: the run's")


def run(options: argparse.Namespace) -> int:
    """0, at the end of the input. Raises a SamerouteError."""
    from pipeline.config import ConfigError

    if not (options.run / "config.yaml").is_file():  # known before imports that take seconds
        raise ConfigError(f"{options.run} is no run directory: it has no config.yaml")
    with lasting_imports():
        from pipeline.loop.stop import StopRequest
        from pipeline.loop.talk import chat

    StopRequest(None).listen()
    chat(
        options.run,
        checkpoint=options.checkpoint,
        system=options.system,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
    )
    return 0
