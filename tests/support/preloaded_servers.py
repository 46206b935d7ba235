"""The process that forks servers, `pipeline.engine.inside.preloaded`, of which tests also have modules of their own
forked that need SGLang: `... SOCKET KEEPER_PID`."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO

from pipeline.config.server import ServerConfig
from pipeline.engine.inside import preloaded, serve
from pipeline.engine.server import SGLangServer
from pipeline.forks import FORKS_VARIABLE, ROOM, end_as, ended, request
from pipeline.forks import serve as fork_children
from tests.support import planted

_MODULE = "-m"


def environment() -> dict[str, str]:
    """Of the imports."""
    server = SGLangServer(ServerConfig(), Path(), Path(), device="cpu", seed=0, return_routed_experts=True)
    return server.environment_of_imports()


def start(socket: Path, keeper: int, log: IO[bytes], title: str) -> None:
    """As `preloaded.start` does."""
    subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.support.preloaded_servers", str(socket), str(keeper), title],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment() | ROOM,
    )


def run_module(name: str, output: Path) -> int:
    """`python -m NAME` on a CPU in a process that has imported SGLang; its exit code. output: of both its streams."""
    place = os.environ[FORKS_VARIABLE]
    with output.open("wb") as out, open(os.devnull, "rb") as nothing:
        streams = nothing.fileno(), out.fileno(), out.fileno()
        with request(place, [_MODULE, name], environment(), streams) as connection:
            return ended(place, connection)


def main() -> None:
    """Returns in a server that has been asked to stop, and behind a module."""
    forked = fork_children(Path(sys.argv[1]), int(sys.argv[2]), preloaded._import, preloaded._READ)
    if forked.arguments[0] != _MODULE:
        forked.follow(serve.leave)
        planted.in_server()
        serve.serve(forked.arguments)
        return
    forked.follow(lambda: os._exit(1))
    _, name, *sys.argv[1:] = forked.arguments
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        end_as(1)
    sys.stdout.flush()
    end_as(0)  # taking apart all that was imported crashes once threads have computed


if __name__ == "__main__":
    main()
