"""What SGLang 0.5.23 lacks on a CPU where ranks of a server part experts (`--ep-size`) or requests (`--attn-dp-size`).

experts: the formula of all experts takes -1, which its dispatcher gives to an expert that another rank has, for one.
         `patches.mixture_of_experts` has that right.
rows:    a rank's batch is made as long as the longest by rows that nobody reads. How much such a row attends to is
         asked of every attention backend on a CPU (`ForwardBatch._pad_inputs_to_size`), and that for AMX alone says it.
sums:    where both are parted, each rank takes its rows of a sum over all, by NCCL. For deterministic inference SGLang
         has the same as an all-reduce, which there is on a CPU.
sleep:   ranks that part requests ask each other before each batch. One that has none sleeps for a second at a time
         (`--sleep-on-idle`), and lets the others wait as long for every batch and every transfer's call. And who deals
         requests out among them asks for one without a pause, which takes a core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from typing import Any

_NAP_MS = 10
_LOOK_MS = 1000


def install() -> None:
    """Put all in place; call once, before schedulers are forked."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.managers.data_parallel_controller import DataParallelController
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    IdleSleeper.maybe_sleep = partialmethod(_sleep, IdleSleeper.maybe_sleep)  # pyright: ignore[reportAttributeAccessIssue]
    DataParallelController.event_loop = _deal_out  # pyright: ignore[reportAttributeAccessIssue]
    AttentionBackend.get_cpu_graph_seq_len_fill_value = _one  # pyright: ignore[reportAttributeAccessIssue]
    GroupCoordinator.reduce_scatterv = _own_rows_of_sum  # pyright: ignore[reportAttributeAccessIssue]


def _one(backend: Any) -> int:
    """The row's own token."""
    return 1


def _own_rows_of_sum(group: Any, rows: Any, output: Any = None, sizes: list[int] | None = None) -> Any:
    """GroupCoordinator.reduce_scatterv. rows: [tokens of all ranks, ...]. sizes: tokens of each; None: as many."""
    return group._deterministic_reduce_scatterv(rows, output, sizes)


def _sleep(sleeper: Any, original: Callable[[Any], None]) -> None:
    """IdleSleeper.maybe_sleep: until a request comes, and not longer than others may wait."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().attn_dp_size > 1:
        sleeper.poller.poll(_NAP_MS)
    else:
        original(sleeper)


def _deal_out(controller: Any) -> None:
    """DataParallelController.event_loop."""
    from sglang.srt.managers.data_parallel_controller import sock_recv

    while True:
        controller.soft_watchdog.feed()
        if controller.recv_from_tokenizer.poll(_LOOK_MS):
            controller._request_dispatcher(sock_recv(controller.recv_from_tokenizer))
