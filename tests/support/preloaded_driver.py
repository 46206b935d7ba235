"""A process that has imported what `sameroute train` imports and forks drivers: `... SOCKET KEEPER_PID`.

A driver's arguments: a file for its process id, then those of the command.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from pipeline.forks import serve
from pipeline.imports import lasting_imports

_MODULES = (
    "pipeline.commands.main",
    "pipeline.loop.run",
    "matplotlib.pyplot",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "transformers",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
_READ = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH", "RAY_JOB_CONFIG_JSON_ENV_VAR")


def _import() -> None:
    with lasting_imports():
        for name in _MODULES:
            importlib.import_module(name)

    from tests.support.preloaded import set_up_by_a_fork

    set_up_by_a_fork()


def main() -> int:
    """Fork drivers; returns in each of them the exit code of its command."""
    forked = serve(Path(sys.argv[1]), int(sys.argv[2]), _import, _READ)
    forked.follow(lambda: os._exit(1))
    file, *sys.argv[1:] = forked.arguments
    Path(file).with_suffix(".new").write_text(str(os.getpid()))
    Path(file).with_suffix(".new").rename(file)

    from pipeline.commands.main import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
