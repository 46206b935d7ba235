"""Process groups: one call turns a process into a rank of the trainer."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from megatron_ext import cpu
from megatron_ext.config import ParallelConfig
from megatron_ext.cpu.freed_memory import keep_freed_memory
from megatron_ext.mcore import model_parallel_cuda_manual_seed, parallel_state
from megatron_ext.meeting import tcp_store


def initialize(config: ParallelConfig, *, rank: int, init_method: str, seed: int = 0, timeout_s: float = 600.0) -> None:
    """Join the trainer's world and make Megatron-Core's groups.

    rank:        0 .. config.ranks - 1.
    init_method: where the ranks meet, "tcp://host:port" (rank 0 listens there and nowhere else), "file:///path" or
                 "env://".
    seed:        of weights and dropout.
    timeout_s:   a collective that takes longer ends the rank.
    """
    on_cpu = cpu.needed()
    if on_cpu:
        keep_freed_memory()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=timeout_s)
    meeting: dict[str, Any] = {"init_method": init_method}
    if init_method.startswith("tcp://"):
        meeting = {"store": _store(init_method, rank, config.ranks, timeout)}
    dist.init_process_group(
        "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
        rank=rank,
        world_size=config.ranks,
        timeout=timeout,
        **meeting,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=True,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _store(init_method: str, rank: int, ranks: int, timeout: timedelta) -> dist.TCPStore:
    place = urlparse(init_method)
    if place.hostname is None or place.port is None:
        raise ValueError(f"{init_method!r} is not tcp://host:port")
    return tcp_store(place.hostname, place.port, rank=rank, ranks=ranks, timeout=timeout)


def shutdown() -> None:
    """Leave the world; harmless where there is none."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_reporter(*, any_stage: bool = False) -> bool:
    """Whether this rank speaks for its data-parallel replica: last pipeline stage (or any), first tensor and context
    rank."""
    return (
        (any_stage or parallel_state.is_pipeline_last_stage(ignore_virtual=True))
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
