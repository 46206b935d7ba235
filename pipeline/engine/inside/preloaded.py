"""A process that has imported SGLang and forks servers: `python -m pipeline.engine.inside.preloaded SOCKET KEEPER_PID`.

The imports take ten seconds of a processor. A run on a CPU has the process make them from the moment that its
configuration is read (`importing`), and its servers, restarted ones too, are forked from it, see `pipeline/forks.py`;
they find it by its variable, through `serve.py`. On GPUs nothing is forked: each server imports.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline import forks
from pipeline.config.server import ServerConfig
from pipeline.deaf import deaf_children
from pipeline.engine.inside import serve
from pipeline.engine.server import SGLangServer
from pipeline.imports import lasting_imports
from pipeline.socket_folder import make_socket_folder

_MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.models.registry",
    "pipeline.engine.inside.hooks",
    "pipeline.engine.inside.cpu.batched_attention",
    "pipeline.engine.inside.cpu.patches",
)
_READ = (
    "SGLANG_USE_CPU_ENGINE",
    "SGLANG_EXTERNAL_MODEL_PACKAGE",
    "OMP_NUM_THREADS",
    "TORCHDYNAMO_DISABLE",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
)
_LONGEST_FOLDER = 80  # bytes
_TITLE = " " * 4000  # a server changes its title in place, and has a longer one


def start(socket: Path, keeper: int, config: ServerConfig, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The process that listens at `socket` for as long as the process `keeper` lives.

    config: of the servers on the CPU, their `cpu_threads` settled. log: an open file, for what it says.
    """
    server = SGLangServer(config, Path(), Path(), device="cpu", seed=0, return_routed_experts=True)
    module = "pipeline.engine.inside.preloaded"
    with deaf_children():
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(socket), str(keeper), _TITLE],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=server.environment_of_imports() | forks.ROOM,
        )


@contextlib.contextmanager
def importing(config: ServerConfig) -> Iterator[None]:
    """Inside, servers on the CPU that this process starts are forked from one that has begun with their imports on
    return, and is gone behind the block. Nothing is done where they are forked already.

    config: of the servers, their `cpu_threads` settled. Raises OSError where no folder for its socket can be made.
    """
    if forks.FORKS_VARIABLE in os.environ:
        yield
        return
    folder = make_socket_folder(_LONGEST_FOLDER)
    socket = folder / "servers"
    with tempfile.TemporaryFile() as log:
        process = start(socket, os.getpid(), config, log)
    os.environ[forks.FORKS_VARIABLE] = str(socket)
    try:
        yield
    finally:
        del os.environ[forks.FORKS_VARIABLE]
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _import() -> None:
    for absent in ("megatron", "flashinfer"):  # as `serve.py` and `plugin.py` have it
        sys.modules[absent] = None  # pyright: ignore[reportArgumentType]
    with lasting_imports():
        for name in _MODULES:
            importlib.import_module(name)


def main() -> None:
    """Fork servers; returns in each of them when it has been asked to stop."""
    socket = Path(sys.argv[1])
    try:
        forked = forks.serve(socket, int(sys.argv[2]), _import, _READ)
    except SystemExit:  # the keeper was killed, and could not remove it
        socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it has other files
            socket.parent.rmdir()
        raise
    forked.follow(serve.leave)
    serve.serve(forked.arguments)


if __name__ == "__main__":
    main()
