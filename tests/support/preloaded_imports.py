"""A process that makes the imports of the tests once and forks those that need them: `... FOLDER KEEPER_PID`.

It listens at four places of the folder, each under the name of what is forked there:

    programs  Modules of tests that choose what is there for all but torch. Arguments: the module's name, then its own.
    workers   Ray's workers. Ray reads a worker's job when it is first imported: it is not.
    drivers   `sameroute train`, with what that imports. Arguments: a file for its process id, then the command's.
    tests     pytest's own workers, with what files of tests import. Arguments: those of Python.

What one of them must not have is imported after it was branched off.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from pipeline.forks import Forked, serve
from pipeline.imports import lasting_imports

_ALL = ("numpy", "torch", "torch._dynamo", "aiohttp", "pydantic", "megatron_ext.cpu.row_loops")
_WORKERS = (
    "pipeline.trainer.losses",
    "pipeline.weights",
    "megatron_ext.trainer",
    "megatron.core.models.mimo.optimizer",  # the first optimizer asks for it
)
_DRIVERS = (
    "pipeline.commands.main",
    "pipeline.loop.run",
    "matplotlib.pyplot",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "transformers",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
_TESTS = (
    "tests.support.preload",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "pipeline.engine.inside.cpu.kernels",
    "pipeline.loop.open_loop",
    "hypothesis.strategies",
    "openai",
    "playwright.sync_api",
)
_READ = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")  # of OMP_NUM_THREADS each makes its own


class _Branches:
    """before: the environment before the imports, which each that is forked has but for what they set."""

    def __init__(self, folder: Path, keeper: int):
        self.folder, self.keeper, self.before = folder, keeper, dict(os.environ)

    def imports(self, names: Sequence[str]) -> None:
        with lasting_imports():
            for name in names:
                importlib.import_module(name)

    def branch(self, name: str, become: Callable[[Forked], int], more: Sequence[str] = (), reads=_READ) -> None:
        """A process from here on, after `more` imports. It never comes back."""
        if os.fork() == 0:
            sys.exit(self.fork(name, become, more, reads))

    def fork(self, name: str, become: Callable[[Forked], int], more: Sequence[str], reads=_READ) -> int:
        """Returns in what was forked, what that one returns."""
        self.imports(more)
        changed = {name: value for name, value in os.environ.items() if self.before.get(name) != value}
        os.environ.clear()
        os.environ.update(self.before)
        return become(serve(self.folder / name, self.keeper, lambda: os.environ.update(changed), reads))


def _program(forked: Forked) -> int:
    import runpy

    forked.follow(lambda: os._exit(1))
    module, *sys.argv[1:] = forked.arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _worker(forked: Forked) -> int:
    import runpy

    from tests.support import planted

    forked.follow(lambda: os._exit(1))
    planted.in_rank()
    sys.argv = forked.arguments
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def _driver(forked: Forked) -> int:
    from pipeline.commands.main import main as command
    from tests.support.preloaded import set_up_by_a_fork

    forked.follow(lambda: os._exit(1))
    set_up_by_a_fork()
    file, *sys.argv[1:] = forked.arguments
    Path(file).with_suffix(".new").write_text(str(os.getpid()))
    Path(file).with_suffix(".new").rename(file)
    return command(sys.argv[1:])


def _pytest(forked: Forked) -> int:
    from tests.support.forked_ranks import start_forkserver

    # before there are threads; the folder's own name is still the first argument
    start_forkserver(Path(sys.argv[1], f"ranks_{os.getpid()}.log"))
    forked.follow(lambda: os._exit(1))
    sys.argv, sys.modules["__main__"] = ["-c"], ModuleType("__main__")
    exec(forked.arguments[-1], sys.modules["__main__"].__dict__)  # what execnet has Python do
    return 0


def main() -> int:
    branches = _Branches(Path(sys.argv[1]), int(sys.argv[2]))
    branches.imports(_ALL)
    assert "ray" not in sys.modules
    branches.branch("programs", _program)
    branches.branch("workers", _worker, _WORKERS)
    branches.imports(_DRIVERS)
    branches.branch("drivers", _driver, reads=(*_READ, "RAY_JOB_CONFIG_JSON_ENV_VAR"))
    return branches.fork("tests", _pytest, _TESTS)


if __name__ == "__main__":
    sys.exit(main())
