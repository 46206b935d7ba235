"""How many threads an engine's matrix products get where there is no GPU, and an Adam that lies beside one.

Server and trainer work by turns, so that each may have all cores: what waits leaves its core to the other.
"""

from __future__ import annotations

import os
from typing import Literal

from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config

_SMALL = 256
"""Width of the residual stream below which starting threads costs more than they save."""


def cpu_threads(configured: int | None, hidden: int, processes: int) -> int:
    """configured: by the run, or None. hidden: the model's width. processes: of this kind, on this machine."""
    if configured is not None:
        return configured
    return 1 if hidden < _SMALL else cores_of_each(processes)


def cores_of_each(processes: int) -> int:
    """This machine's cores for each of so many processes, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, processes))


def with_threads(config: Config, model: ModelDescription, device: Literal["cpu", "cuda"]) -> Config:
    """The same with the threads of both engines settled: see ServerConfig.cpu_threads and ClusterConfig.cpu_threads."""
    if device == "cuda":
        offloaded = config.trainer.offload_optimizer  # else nothing of a step is computed by the processor
        ranks = min(config.parallel.ranks, config.cluster.gpus_per_node) if offloaded else 0
        threads = config.cluster.cpu_threads or (cores_of_each(ranks) if ranks else 1)
        return config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpu_threads": threads})})
    servers = (config.server.replicas or 1) * config.server.tensor_parallel
    server = cpu_threads(config.server.cpu_threads, model.hidden, servers)
    trainer = cpu_threads(config.cluster.cpu_threads, model.hidden, config.parallel.ranks)
    return config.model_copy(
        update={
            "server": config.server.model_copy(update={"cpu_threads": server}),
            "cluster": config.cluster.model_copy(update={"cpu_threads": trainer}),
        }
    )


def thread_environment(threads: int) -> dict[str, str]:
    """What OpenMP is told. A thread that waits must not spin on a core that the other engine wants."""
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if threads > 1 else {}
    return {"OMP_NUM_THREADS": str(threads)} | waiting
