"""A process that has imported SGLang and forks servers: `python -m pipeline.engine.inside.preloaded SOCKET KEEPER_PID`.

See `pipeline/forks.py`. Servers on the CPU find it by its variable, through `serve.py`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from pipeline import forks
from pipeline.engine.inside import serve
from pipeline.imports import lasting_imports

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


def _import() -> None:
    for absent in ("megatron", "flashinfer"):  # as `serve.py` and `plugin.py` have it
        sys.modules[absent] = None  # pyright: ignore[reportArgumentType]
    with lasting_imports():
        for name in _MODULES:
            importlib.import_module(name)


def main() -> None:
    """Fork servers; returns in each of them when it has been asked to stop."""
    forked = forks.serve(Path(sys.argv[1]), int(sys.argv[2]), _import, _READ)
    forked.follow(serve.leave)
    serve.serve(forked.arguments)


if __name__ == "__main__":
    main()
