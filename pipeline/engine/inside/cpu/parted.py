"""What SGLang 0.5.23 lacks on a CPU where ranks of a server part experts (`--ep-size`) or requests (`--attn-dp-size`).

experts: the formula of all experts takes -1, which its dispatcher gives to an expert that another rank has, for one.
         `patches.mixture_of_experts` has that right.
rows:    a rank's batch is made as long as the longest by rows that nobody reads. How much such a row attends to is
         asked of every attention backend on a CPU (`ForwardBatch._pad_inputs_to_size`), and that for AMX alone says it.
sums:    where both are parted, each rank takes its rows of a sum over all, by NCCL. For deterministic inference SGLang
         has the same as an all-reduce, which there is on a CPU.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Put both in place; call once, before schedulers are forked."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    AttentionBackend.get_cpu_graph_seq_len_fill_value = _one  # pyright: ignore[reportAttributeAccessIssue]
    GroupCoordinator.reduce_scatterv = _own_rows_of_sum  # pyright: ignore[reportAttributeAccessIssue]


def _one(backend: Any) -> int:
    """The row's own token."""
    return 1


def _own_rows_of_sum(group: Any, rows: Any, output: Any = None, sizes: list[int] | None = None) -> Any:
    """GroupCoordinator.reduce_scatterv. rows: [tokens of all ranks, ...]. sizes: tokens of each; None: as many."""
    return group._deterministic_reduce_scatterv(rows, output, sizes)
