"""A process that has imported Megatron-Core and forks Ray's workers: `... SOCKET KEEPER_PID`."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path

from pipeline.forks import serve
from pipeline.imports import lasting_imports

_MODULES = (
    "pipeline.trainer.losses",
    "pipeline.weights",
    "megatron_ext.trainer",
    "megatron.core.models.mimo.optimizer",  # the first optimizer asks for it
    "torch._dynamo",
)
_READ = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")  # of OMP_NUM_THREADS a rank makes its own


def _import() -> None:
    with lasting_imports():
        for name in _MODULES:
            importlib.import_module(name)
    # Ray reads a worker's job from the environment when it is first imported.
    assert "ray" not in sys.modules


def main() -> None:
    """Fork workers; returns in each of them when it has ended."""
    forked = serve(Path(sys.argv[1]), int(sys.argv[2]), _import, _READ)
    forked.follow(lambda: os._exit(1))
    sys.argv = forked.arguments
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
