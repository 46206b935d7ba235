"""The ranks of a layout as processes of this machine: Megatron-Core is imported once, in a server that forks them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from megatron_ext import parallel
from megatron_ext.config import ParallelConfig


class RankError(RuntimeError):
    """A rank ended without saying why."""


def run_ranks(function: Callable, config: ParallelConfig, *args: Any) -> None:
    """`function(*args)` on every rank of `config`, process groups made. One rank is this process.

    Raises what the first rank that failed raised, after ending the others, or RankError.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        if config.ranks == 1:
            _join(function, config, 0, meeting, args)
            return
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_ext.convert.tensors"])
        errors = context.SimpleQueue()
        ranks = [
            context.Process(target=_child, args=(errors, function, config, rank, meeting, args), name=f"rank {rank}")
            for rank in range(config.ranks)
        ]
        try:
            for process in ranks:
                process.start()
            _watch(ranks, errors)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _watch(ranks: list, errors) -> None:
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)  # pyright: ignore[reportArgumentType]
            process.join()
            if process.exitcode:
                if not errors.empty():
                    raise errors.get()
                raise RankError(f"{process.name} ended with exit code {process.exitcode}; -9: out of memory, often")


def _child(errors, function: Callable, config: ParallelConfig, rank: int, meeting: str, args: tuple) -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        _join(function, config, rank, meeting, args)
    except Exception as error:
        errors.put(error)
        raise SystemExit(1) from error


def _join(function: Callable, config: ParallelConfig, rank: int, meeting: str, args: tuple) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # copies wait for memory, and torch's threads take their cores from reading ahead
    try:
        parallel.initialize(config, rank=rank, init_method=meeting)
        try:
            function(*args)
        finally:
            parallel.shutdown()
    finally:
        torch.set_num_threads(threads)
