"""Run a function on several trainer ranks, quickly: Megatron-Core is imported once, in a server that forks them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from typing import Any

import pytest

from megatron_ext.config import ParallelConfig

_PRELOAD = "tests.support.preload"
_TIMEOUT_S = 240


def _alone(function: Callable, args: tuple, environment: dict[str, str]) -> Any:
    os.environ |= environment
    return function(*args)


def _start_server() -> None:
    """Of one thread: autograd's own threads do not know what torch was told, and a second one spins while it waits."""
    forkserver.set_forkserver_preload([_PRELOAD])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as `fork_ranks` has it
        forkserver.ensure_running()


def run_alone(function: Callable, *args: Any, environments: tuple[dict[str, str], ...] = ({},)) -> list[Any]:
    """`function(*args)` in a process for each environment, without process groups: what it runs makes its own.

    Returns the answers in order. Raises what the first process that failed raised.
    """
    from megatron_ext.convert.ranks import fork_all

    _start_server()
    jobs = [partial(_alone, function, args, environment) for environment in environments]
    return fork_all(jobs, preload=_PRELOAD, timeout_s=_TIMEOUT_S)


def run_ranks(function: Callable, config: ParallelConfig, *args: Any) -> list[Any]:
    """`function(config, *args)` on every rank of `config`, in processes of their own, process groups made.

    Returns the answers in rank order. Raises what the first rank that failed raised.
    """
    from megatron_ext.convert.ranks import fork_ranks

    _start_server()
    return fork_ranks(function, config, config, *args, preload=_PRELOAD, timeout_s=_TIMEOUT_S)
