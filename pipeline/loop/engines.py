"""Ray and the processes of a run on it: trainer ranks and servers, here or on the nodes of a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import ray

from pipeline.cluster.placement import wait_and_place
from pipeline.cluster.ray_processes import died_said, leave_out_the_raylets_log
from pipeline.config import Config
from pipeline.config.weights import WeightsConfig
from pipeline.engine.remote import RemoteServer
from pipeline.engine.server import ServerError, SGLangServer
from pipeline.trainer.group import TrainerGroup


def server_count(config: Config, gpus: int) -> int:
    """How many servers the run has: see ServerConfig.replicas. gpus: of this machine; 0: the run uses none.

    Raises ServerError where several of them are to listen on one port of this machine.
    """
    if config.server.replicas is not None or not gpus:
        count = config.server.replicas or 1
    else:
        beside = gpus - config.parallel.ranks if config.cluster.address is None else config.rollout_gpus
        count = max(1, beside // config.server.tensor_parallel)
    if count > 1 and config.server.port is not None and config.cluster.address is None:
        raise ServerError(
            f"{count} servers on one machine cannot all listen on port {config.server.port}; set server.port=null, "
            "which gives each a free one, or server.replicas=1"
        )
    return count


def shares_gpus(config: Config, gpus: int) -> bool:
    """Whether trainer and servers run side by side on the same GPUs of this machine, which has too few for both."""
    needed = config.parallel.ranks + server_count(config, gpus) * config.server.tensor_parallel
    return config.cluster.address is None and gpus < needed


def weights_config(config: Config, gpus: int) -> WeightsConfig:
    """How weights travel. Servers on GPUs of their own see no others, so they cannot map a trainer's memory, even on
    its machine: there `auto` is a process group."""
    if config.weights.transport != "auto" or not gpus or shares_gpus(config, gpus):
        return config.weights
    return config.weights.model_copy(update={"transport": "distributed"})


@contextlib.contextmanager
def cluster(
    config: Config, servers: list[SGLangServer], gpus: int
) -> Iterator[tuple[Sequence[SGLangServer | RemoteServer], list[str] | None]]:
    """Ray up and the servers started: as children of this process where there are no GPUs, or too few for both engines;
    else by Ray, on GPUs and nodes of their own.

    gpus: of this machine; 0: the run uses none.
    Yields the servers, and in the second case the node of each trainer rank. All is gone on leaving. Raises ServerError
    for a server that could never work, and PlacementError for a cluster that does not hold the run.
    """
    with contextlib.ExitStack() as stack:
        if config.cluster.address is None and (not gpus or shares_gpus(config, gpus)):
            for server in servers:
                stack.callback(server.stop)
                server.start()  # it loads while Ray and the trainer do
            stack.enter_context(_ray(config))
            yield servers, None
            return
        stack.enter_context(_ray(config))
        placement = wait_and_place(
            config.parallel.ranks,
            [config.server.tensor_parallel] * len(servers),
            gpus=gpus > 0,
            timeout_s=config.cluster.join_timeout_s,
        )
        kind = {"gpus": gpus > 0, "reachable": config.cluster.address is not None}
        remote = [RemoteServer(s, node, **kind) for s, node in zip(servers, placement.servers, strict=True)]
        for server in remote:
            stack.callback(server.stop)
        for server in remote:
            server.start()
        yield remote, placement.trainers


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Ray started here, or joined."""
    on_termination = signal.getsignal(signal.SIGTERM)
    leave_out_the_raylets_log()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a trainer that shares a laptop's cores
    if config.cluster.address is None:
        ray.init(
            address="local",  # never another run's cluster on this machine
            num_cpus=config.parallel.ranks + 1,
            include_dashboard=False,
            object_store_memory=int(config.cluster.object_store_gb * 1e9),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    else:
        ray.init(address=config.cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    # Ray takes SIGTERM over and aborts the process in the middle of its own clean-up (2.60); the caller's stays.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)
    try:
        with died_said():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def trainer_group(
    config: Config,
    device: Literal["cpu", "cuda"],
    logs: Path,
    servers: Sequence[SGLangServer | RemoteServer],
    nodes: list[str] | None,
) -> Iterator[TrainerGroup]:
    """One actor a trainer rank; all gone on leaving. A server that dies ends what they wait for."""

    def watch() -> None:
        for server in servers:
            if not server.alive():
                raise ServerError(f"the SGLang server died\n{server.log_tail()}")

    group = TrainerGroup(
        config.parallel,
        gpus=device == "cuda",
        log_directory=logs,
        threads=config.cluster.cpu_threads,
        timeout_s=config.cluster.call_timeout_s,
        watch=watch,
        nodes=nodes,
    )
    try:
        yield group
    finally:
        group.stop()
