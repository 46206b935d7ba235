"""`sameroute servers RUN`: the servers of a run that goes on; add one, take one out, start one for it."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine.joining.server_requests import ServerRequest

_LOOK_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, help="directory of a run that goes on")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--add", metavar="URL", help="a server that --start started, or one of the run's that has left")
    what.add_argument("--remove", metavar="URL", help="take a server out; its open answers go on elsewhere")
    what.add_argument(
        "--start",
        action="store_true",
        help="start a server on this machine as the run starts its own, add it, and take it out again with Ctrl-C",
    )
    parser.add_argument("--keys", type=Path, metavar="FILE", help="with --add: the keys that open it")
    parser.add_argument("--host", help="with --start: the address that it listens on, which the run reaches")
    parser.add_argument("--port", type=int, help="with --start: default, a free one")


def run(options: argparse.Namespace) -> int:
    """0; 1 where the run refuses. Raises ConfigError, ServerRequestError and ServerError."""
    from pipeline.config.file import ConfigError

    if not (options.run / "config.yaml").is_file():
        raise ConfigError(f"{options.run} is no run directory: it has no config.yaml")
    from pipeline.engine.joining.server_requests import ask, read_now

    if options.start:
        return _start(options)
    if options.add or options.remove:
        action = "add" if options.add else "remove"
        told = _waited_for(options.run, ask(options.run, action, options.add or options.remove, options.keys, None))
        print(told.words)
        return int(told.refused)
    for number, row in enumerate(read_now(options.run)):
        whose = ", added" if row["added"] else ""
        print(f"{number}  {row['url']}  {row['state']}, weights {row['weights']}{whose}")
    return 0


def _waited_for(run: Path, request: ServerRequest) -> ServerRequest:
    """What the run says to a request. Raises ConfigError where no run goes on there."""
    from pipeline.config.file import ConfigError
    from pipeline.disk.lock import NAME
    from pipeline.engine.joining.server_requests import answered, withdraw

    print("waiting for the end of the run's step", flush=True)
    while (told := answered(run, request)) is None:
        if not (run / NAME).exists():
            withdraw(run, request)
            raise ConfigError(f"no run goes on in {run}; start it, or resume it, and ask again")
        time.sleep(_LOOK_S)
    return told


def _start(options: argparse.Namespace) -> int:
    from megatron_ext.hf.description import read_description
    from pipeline.config.load_config import config_of_run, load_config
    from pipeline.engine.joining.server_requests import FOLDER, ask, write_keys
    from pipeline.loop.engines import server_beside

    config = load_config(config_of_run(options.run), [])
    given = {name: getattr(options, name) for name in ("host", "port") if getattr(options, name) is not None}
    config = config.model_copy(update={"server": config.server.model_copy(update={"port": None} | given)})
    model = config.model.path or options.run / "model"
    routes = config.replay.of_model(read_description(model).num_experts).from_server
    folder = options.run / FOLDER
    folder.mkdir(exist_ok=True)
    name = f"added_{time.strftime('%Y%m%d_%H%M%S')}"
    log, keys = options.run / "logs" / f"sglang_{name}.log", folder / f"{name}.keys"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(server_beside(config, model, log, routes=routes))
        write_keys(keys, server.keys)
        stack.callback(keys.unlink, missing_ok=True)
        print(f"{server.url} is up; its log: {log}, its keys: {keys}", flush=True)
        told = _waited_for(options.run, ask(options.run, "add", server.url, keys, log))
        print(told.words, flush=True)
        if told.refused:
            return 1
        while server.alive() and _serves(options.run, server.url):
            try:
                time.sleep(_LOOK_S)
            except KeyboardInterrupt:
                print(_waited_for(options.run, ask(options.run, "remove", server.url, None, None)).words, flush=True)
        print(f"{server.url} is no server of the run any more, and ends", flush=True)
    return 0


def _serves(run: Path, url: str) -> bool:
    """Whether the run goes on, and has this server."""
    from pipeline.disk.lock import NAME
    from pipeline.engine.joining.server_requests import read_now

    rows = [row for row in read_now(run) if row["url"] == url]
    return (run / NAME).exists() and (not rows or rows[-1]["state"] != "left")
