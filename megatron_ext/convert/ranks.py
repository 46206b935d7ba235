"""The ranks of a layout as processes of this machine: Megatron-Core is imported once, in a server that forks them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_ext import parallel
from megatron_ext.config import ParallelConfig

_END_S = 10  # in which a process ends that has answered


class RankError(RuntimeError):
    """A rank ended without saying why, or did not end."""


def run_ranks(function: Callable, config: ParallelConfig, *args: Any) -> None:
    """`function(*args)` on every rank of `config`, process groups made. One rank is this process.

    Raises what the first rank that failed raised, after ending the others, or RankError.
    """
    if config.ranks == 1:
        with tempfile.TemporaryDirectory() as folder:
            _join(function, config, 0, folder, None, args)
    else:
        fork_ranks(function, config, *args, preload="megatron_ext.convert.tensors")


def fork_ranks(
    function: Callable, config: ParallelConfig, *args: Any, preload: str, timeout_s: float | None = None
) -> list[Any]:
    """`function(*args)` on every rank of `config`, each in a process of its own, process groups made.

    preload: the module that the server imports before it forks the first. timeout_s: of all of it, and of a collective.
    Returns the answers in rank order. Raises as `fork_all` does.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [partial(_join, function, config, rank, folder, timeout_s, args) for rank in range(config.ranks)]
        return fork_all(jobs, preload=preload, timeout_s=timeout_s)


def fork_all(jobs: Sequence[Callable[[], Any]], *, preload: str, timeout_s: float | None = None) -> list[Any]:
    """Every job in a process of its own, together; their answers in the order of the jobs.

    Raises what the first that failed raised, with where it did in a note, or RankError where one ended without a word
    or they took longer than timeout_s seconds. No process is left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    processes, waiting, end_s = [], {}, 0
    try:
        for number, job in enumerate(jobs):
            receiver, sender = context.Pipe(duplex=False)
            processes.append(context.Process(target=_child, args=(sender, number, job), name=f"rank {number}"))
            waiting[receiver] = number
            processes[-1].start()
            sender.close()  # the child's is the last: it ends when the child does
        answers = _answers(waiting, processes, timeout_s)
        end_s = _END_S
        return [answers[number] for number in range(len(jobs))]
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(end_s)
                process.kill()
                process.join()


def _answers(waiting: dict[Connection, int], processes: list, timeout_s: float | None) -> dict[int, Any]:
    began, answers = time.monotonic(), {}
    while waiting:
        ready = wait(list(waiting), None if timeout_s is None else max(0, began + timeout_s - time.monotonic()))
        if not ready:
            late = ", ".join(processes[number].name for number in waiting.values())
            raise RankError(f"{late} did not end in {timeout_s:g} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            number = waiting.pop(receiver)
            try:
                error, answers[number] = receiver.recv()
            except EOFError:
                processes[number].join()
                code = processes[number].exitcode
                raise RankError(
                    f"{processes[number].name} ended with exit code {code}; -9: out of memory, often"
                ) from None
            if error is not None:
                raise error
    return answers


def _child(sender: Connection, number: int, job: Callable[[], Any]) -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        answer = job()
    except BaseException as error:
        error.add_note(f"on rank {number}:\n{traceback.format_exc()}")
        sender.send((error, None))
        raise SystemExit(1) from error
    sender.send((None, answer))


def _join(
    function: Callable, config: ParallelConfig, rank: int, folder: str, timeout_s: float | None, args: tuple
) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # copies wait for memory, and torch's threads take their cores from reading ahead
    limit = {} if timeout_s is None else {"timeout_s": timeout_s}
    try:
        parallel.initialize(config, rank=rank, init_method=f"file://{Path(folder) / 'meeting'}", **limit)
        try:
            return function(*args)
        finally:
            parallel.shutdown()
    finally:
        torch.set_num_threads(threads)
