"""Run a function on several trainer ranks, quickly: Megatron-Core is imported once, in a server that forks them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from megatron_ext.config import ParallelConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


def _rank(function: Callable, config: ParallelConfig, rank: int, meeting: str, args: tuple, answers) -> None:
    import torch

    from megatron_ext import parallel

    torch.set_num_threads(1)
    try:
        parallel.initialize(config, rank=rank, init_method=f"file://{meeting}", timeout_s=100)
        answers.put((rank, None, function(config, *args)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
        raise


def _alone(function: Callable, args: tuple, environment: dict[str, str], answers) -> None:
    os.environ |= environment
    try:
        answers.put((None, function(*args)))
    except BaseException:
        answers.put((traceback.format_exc(), None))
        raise


def run_alone(function: Callable, *args: Any, environments: tuple[dict[str, str], ...] = ({},)) -> list[Any]:
    """`function(*args)` in a process for each environment, without process groups: what it runs makes its own.

    Returns the answers as they come. Raises AssertionError with the traceback of the first process that failed.
    """
    answers = _context.Queue()
    processes = [_context.Process(target=_alone, args=(function, args, e, answers)) for e in environments]
    for p in processes:
        p.start()
    out = []
    try:
        for _ in processes:
            error, answer = answers.get(timeout=240)
            if error is not None:
                raise AssertionError(error)
            out.append(answer)
    finally:
        for p in processes:
            p.join(timeout=10)
            p.kill()
    return out


def run_ranks(function: Callable, config: ParallelConfig, *args: Any) -> list[Any]:
    """`function(config, *args)` on every rank of `config`, in processes of their own, process groups made.

    Returns the answers in rank order. Raises AssertionError with the traceback of the first rank that failed.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answers = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        processes = [
            _context.Process(target=_rank, args=(function, config, r, meeting, args, answers), daemon=True)
            for r in range(config.ranks)
        ]
        for p in processes:
            p.start()
        out: list[Any] = [None] * config.ranks
        try:
            for _ in processes:
                rank, error, answer = answers.get(timeout=120)
                if error is not None:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                out[rank] = answer
        finally:
            for p in processes:
                p.join(timeout=1 if out[0] is None else 10)
                p.kill()
    return out
