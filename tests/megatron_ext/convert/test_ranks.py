"""Ranks as processes: their answers, what a failure says, and that none is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.convert.ranks import RankError, fork_ranks, run_ranks
from tests.support.ranks import run_alone

TWO = ParallelConfig(ranks=2)


def fork(function, *args, timeout_s=240):
    try:
        return fork_ranks(function, TWO, *args, preload="tests.support.preload", timeout_s=timeout_s)
    finally:
        assert multiprocessing.active_children() == []


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def large_sum(number: int) -> np.ndarray:
    import torch
    import torch.distributed as dist

    tensor = torch.full([1_000_000], float(number + dist.get_rank()))
    dist.all_reduce(tensor)
    return tensor.numpy()


def fail(on: int) -> None:
    if rank() == on:
        raise ValueError("no such thing")
    time.sleep(600)


def kill(on: int) -> None:
    if rank() == on:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_answers_come_in_the_order_of_the_ranks_whatever_their_size():
    assert fork(rank) == [0, 1]
    assert all((answer == 7).all() for answer in fork(large_sum, 3))


def test_an_error_is_the_ranks_own_with_its_place_and_the_others_are_ended():
    with pytest.raises(ValueError, match="no such thing") as raised:
        fork(fail, 1)
    (note,) = raised.value.__notes__
    assert note.startswith("on rank 1:\nTraceback")
    assert "in fail" in note
    with pytest.raises(ValueError, match="no such thing"):
        run_ranks(fail, TWO, 1)


def test_a_rank_that_is_killed_is_named():
    with pytest.raises(RankError, match=r"rank 1 ended with exit code -9; -9: out of memory, often"):
        fork(kill, 1)


def test_ranks_that_do_not_end_in_time_are_named():
    with pytest.raises(RankError, match=r"rank 0, rank 1 did not end in 0\.5 s"):
        fork(time.sleep, 600, timeout_s=0.5)


def one_rank() -> bool:
    seen = []
    run_ranks(lambda: seen.append(os.getpid()), ParallelConfig())
    return seen == [os.getpid()]


def test_one_rank_is_the_process_that_asks():
    assert run_alone(one_rank) == [True]
