"""The process group of one sender and every rank of every server, which stands beside the trainer's own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megatron_ext.collective_clock import waiting

POLL_S = 0.0005


class BroadcastGroup:
    """One sender's. name: of the group. backend: "gloo" or "nccl"; of the latter `join` makes no communicator yet."""

    def __init__(self, name: str, backend: str):
        self.name, self.backend = name, backend
        self.process_group: Any = None
        self.met = self.broken = False

    def join(self, store: Any, world: int, timeout_s: float, watch: Callable[[], None]) -> None:
        """Meet the servers in `store`. timeout_s: of that, and of every broadcast. watch: called meanwhile; raises to
        end the wait. Raises OSError, RuntimeError or ValueError where the group is not made."""

        def make() -> Any:
            # dist.new_group cannot express a group beside the trainer's own default group
            group, _ = c10d._new_process_group_helper(
                world,
                0,
                [],
                c10d.Backend(self.backend),
                c10d.PrefixStore(self.name, store),
                group_name=self.name,  # pyright: ignore[reportArgumentType]
                timeout=timedelta(seconds=timeout_s),
            )
            return group

        try:
            self.process_group = _beside(make, watch)
        except BaseException:
            self.broken = True
            raise
        c10d._world.pg_group_ranks[self.process_group] = {i: i for i in range(world)}

    def broadcast(self, flat: Tensor, watch: Callable[[], None]) -> None:
        """The bytes to every server. watch: called meanwhile; raises to end the wait. Raises RuntimeError where a
        server leaves. After either the group is of no use."""

        def begin() -> Any:
            with torch.cuda.device(flat.device) if flat.is_cuda else contextlib.nullcontext():
                return dist.broadcast(flat, src=0, group=self.process_group, async_op=True)

        try:
            # NCCL makes its communicator inside the first one, which returns when every rank has come.
            work = _beside(begin, watch) if self.backend == "nccl" and not self.met else begin()
            self.met = True
            wait(work.is_completed, watch)
            work.wait()
        except BaseException:
            self.broken = True
            raise

    def leave(self) -> None:
        """Those that are gone are not waited for."""
        group, self.process_group = self.process_group, None
        if group is None:
            return
        if self.broken and self.backend == "nccl":  # to destroy it would wait for those that are gone
            c10d._abort_process_group(group)
        else:
            dist.destroy_process_group(group)


def wait(done: Callable[[], bool], watch: Callable[[], None]) -> None:
    """Until `done` says so, or `watch` raises."""
    while not done():
        watch()
        with waiting():
            time.sleep(POLL_S)


def _beside[T](call: Callable[[], T], watch: Callable[[], None]) -> T:
    """`call` in a thread, which is abandoned where `watch` raises."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait(answer.done, watch)
    return answer.result()
