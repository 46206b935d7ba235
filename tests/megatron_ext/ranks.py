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
_context.set_forkserver_preload(["megatron_ext.trainer"])


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
