"""Both engines of a run: the servers as a fleet and the trainer ranks as a group, here or on the nodes of a cluster."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from megatron_ext.hf.description import ModelDescription, read_description
from pipeline.cluster.colocation import Colocated
from pipeline.cluster.nccl import nccl_environment
from pipeline.cluster.object_store import object_store_gb
from pipeline.cluster.one_machine import check_gpus, memory_share, places_of_servers
from pipeline.cluster.placement import Placement, PlacementError, other_nodes, wait_and_place
from pipeline.cluster.ray_session import ray_session
from pipeline.cluster.threads import with_threads
from pipeline.config import Config
from pipeline.config.server import ServerConfig, servers_beside
from pipeline.config.weights import WeightsConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.fleet import Fleet, FleetServer, ServerProcess
from pipeline.engine.keys import ServerKeys
from pipeline.engine.nodes.remote import RemoteServer
from pipeline.engine.samplers.stored_client import through_samplers
from pipeline.engine.server import ServerError, SGLangServer
from pipeline.engine.teaching.teacher_fleet import TeacherFleet
from pipeline.loop.inputs import config_device
from pipeline.loop.teaching.teacher_servers import teacher_fleet, teacher_processes
from pipeline.rollout.remote_grading import RemoteGraders, remote_graders
from pipeline.trainer.group import TrainerGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engines:
    """fleet: its servers are started, and load. trainers: started, without a model yet. gpus: of this machine; 0: the
    run uses none. graders: beside the samplers; None: there are none. teacher: its servers; None: none teaches."""

    config: Config
    fleet: Fleet
    trainers: TrainerGroup
    gpus: int
    graders: RemoteGraders | None = None
    teacher: TeacherFleet | None = None

    def take_turns(self) -> None:
        """Where both engines share their GPUs: wait for the servers, whose turn is first. Raises ServerError."""
        if self.config.cluster.colocated and self.fleet.serves:
            self.fleet.wait_ready()
            self.fleet.turns = self.trainers.turns = Colocated(self.trainers, self.fleet)

    def connect(self) -> None:
        """Wait for the servers, and make the way that weights take to them. Raises ServerError, TrainerError."""
        if not self.fleet.serves:
            return
        self.fleet.wait_ready()
        if self.teacher is not None:
            self.teacher.wait_ready()
        weights, rounding = weights_config(self.config, self.gpus), self.config.precision.rollout_weights
        self.trainers.connect(self.fleet.addresses, weights, config_device(self.config), rounding)


@contextlib.contextmanager
def start_engines(
    config: Config,
    model_path: Path,
    shape: ModelDescription,
    logs: Path,
    *,
    serve: bool,
    seed: int,
    teacher: Path | None = None,
) -> Iterator[Engines]:
    """Everything is started inside, and nothing of it is left when the block ends.

    logs: existing folder for the logs of both engines. serve: false starts no server. seed: of the first server's
    sampler. teacher: its model directory. Raises ServerError for a server that could never work, and PlacementError
    for a machine or a cluster that does not hold the run.
    """
    gpus = _gpus(config)
    config = with_threads(config, shape, config_device(config))
    store = {"object_store_gb": object_store_gb(config, shape)}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=store)})
    routes = config.replay.of_model(shape.num_experts).from_server
    environment = nccl_environment(os.environ, config.server.extra_args) if gpus else {}
    local = _servers(config, model_path, logs, gpus, serve=serve, seed=seed, routes=routes, environment=environment)
    own_servers = len(local)
    if serve and teacher is not None:
        device, base = config_device(config), _teacher_base(config, local, gpus)
        local += teacher_processes(config, teacher, logs, device=device, environment=environment, base_gpu=base)
    with contextlib.ExitStack() as stack:
        every, nodes = stack.enter_context(_processes(config, local, gpus))
        processes, teachers = every[:own_servers], every[own_servers:]
        own = [client_of(config, shape, process, routes=routes) for process in processes]
        at = [process.node if isinstance(process, RemoteServer) else None for process in processes]
        samplers, trust = sampler_count(config, len(own)), config.model.trust_remote_code
        clients = stack.enter_context(through_samplers(own, samplers, at))
        beside = list(dict.fromkeys(at)) if samplers else []
        graders = stack.enter_context(remote_graders(beside, model_path, trust)) if beside else None
        fleet = Fleet([FleetServer(*pair) for pair in zip(processes, clients, strict=True)], config.server)
        stack.callback(fleet.close)
        teaching = None
        if serve and teacher is not None:
            client = functools.partial(client_of, config, read_description(teacher), routes=False)
            teaching = teacher_fleet(config, teachers, client)
        if teaching is not None:
            stack.callback(teaching.close)
        trainers = TrainerGroup(
            config.parallel,
            gpus=gpus > 0,
            log_directory=logs,
            threads=config.cluster.cpu_threads or 1,
            timeout_s=config.cluster.call_timeout_s,
            watch=fleet.check_alive,  # a server that dies ends what the trainer waits for
            nodes=nodes,
            environment=environment,
        )
        stack.callback(trainers.stop)
        yield Engines(config, fleet, trainers, gpus, graders, teaching)


@contextlib.contextmanager
def start_servers(
    config: Config, model_path: Path, model: ModelDescription, logs: Path, *, most: int | None = None
) -> Iterator[Fleet]:
    """Servers on this machine that hold the weights of a model directory, ready for requests, and no trainer; nothing
    of them is left when the block ends. On GPUs they take all that this process sees. most: servers.

    Raises ServerError, and PlacementError where the machine has too few GPUs for one.
    """
    processes = servers_alone(with_threads(config, model, config_device(config)), model_path, logs, most=most)
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.stop)
            process.start()
        servers = [FleetServer(process, client_of(config, model, process, routes=False)) for process in processes]
        fleet = Fleet(servers, config.server)
        stack.callback(fleet.close)
        fleet.wait_ready()
        yield fleet


def servers_alone(config: Config, model_path: Path, logs: Path, *, most: int | None = None) -> list[SGLangServer]:
    """Those of `start_servers`, not started."""
    gpus = 0 if config_device(config) == "cpu" else torch.cuda.device_count()
    width = config.server.tensor_parallel
    if gpus and gpus < width:
        raise PlacementError(f"server.tensor_parallel={width} needs as many GPUs, and this machine has {gpus}")
    count = gpus // width if gpus else config.server.replicas or 1
    count = count if most is None else min(count, most)
    own = config.server if count == 1 else config.server.model_copy(update={"port": None})  # nobody else asks them
    settings = [(own, number * width if gpus else 0) for number in range(count)]
    environment = nccl_environment(os.environ, config.server.extra_args) if gpus else {}
    return _made(config, model_path, logs, settings, seed=config.run.seed, routes=False, environment=environment)


def server_beside(config: Config, model_path: Path, log: Path, *, routes: bool) -> SGLangServer:
    """One for a run that goes on elsewhere, with keys of its own, not started. On GPUs it takes the first of those that
    this process sees. routes: requests may ask for them."""
    gpus = config_device(config) != "cpu"
    environment = nccl_environment(os.environ, config.server.extra_args) if gpus else {}
    setting = [(config.server, 0)]
    (server,) = _made(
        config, model_path, log.parent, setting, seed=secrets.randbelow(1 << 31), routes=routes, environment=environment
    )
    server.log_path = log
    return server


def _gpus(config: Config) -> int:
    """GPUs of this machine; 0: the run uses none. Raises PlacementError where they are too few for an engine."""
    if config_device(config) == "cpu":
        return 0
    check_gpus(config, torch.cuda.device_count())
    return max(1, torch.cuda.device_count())  # a controller without one, whose cluster has them


def _servers(
    config: Config,
    model_path: Path,
    logs: Path,
    gpus: int,
    *,
    serve: bool,
    seed: int,
    routes: bool,
    environment: dict[str, str],
) -> list[SGLangServer]:
    """The run's servers, not started."""
    count = server_count(config, gpus) if serve else 0
    places = places_of_servers(config, gpus, count) if gpus and shares_gpus(config, gpus) else [None] * count
    settings = [
        config.server
        if place is None
        else config.server.model_copy(update={"mem_fraction_static": memory_share(config, place)})
        for place in places
    ]
    if any(own != config.server for own in settings):
        logger.warning(
            "server.mem_fraction_static is not set and trainer and server share a GPU: such a server takes %g of its "
            "memory for weights and cache",
            next(own.mem_fraction_static for own in settings if own != config.server),
        )
    bases = [0 if place is None else place.base for place in places]
    return _made(
        config,
        model_path,
        logs,
        list(zip(settings, bases, strict=True)),
        seed=seed,
        routes=routes,
        environment=environment,
    )


def _made(
    config: Config,
    model_path: Path,
    logs: Path,
    settings: Sequence[tuple[ServerConfig, int]],
    *,
    seed: int,
    routes: bool,
    environment: dict[str, str],
) -> list[SGLangServer]:
    """Servers, not started. settings: of each, and its first GPU."""
    keys = ServerKeys.random()  # one pair for all of them
    return [
        SGLangServer(
            own,
            model_path,
            logs / ("sglang.log" if len(settings) == 1 else f"sglang_{number}.log"),
            device=config_device(config),
            seed=seed + number,  # another draw for each
            return_routed_experts=routes,
            precision=config.precision,
            trust_remote_code=config.model.trust_remote_code,
            keys=keys,
            base_gpu=base,
            environment=environment,
            memory_saver=config.cluster.colocated,
        )
        for number, (own, base) in enumerate(settings)
    ]


def _teacher_base(config: Config, servers: Sequence[SGLangServer], gpus: int) -> int:
    """The first GPU of a teacher's servers where both engines share those of this machine: below the run's own, or,
    where nothing is left there, beside the trainer."""
    lowest = min((server.base_gpu for server in servers), default=gpus)
    return max(0, lowest - config.teacher_gpus)


def client_of(config: Config, shape: ModelDescription, process: ServerProcess, *, routes: bool) -> SGLangClient:
    """Of a server of a run. routes: it is asked for them."""
    return SGLangClient(
        process.url,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        topk=shape.topk,
        num_experts=shape.num_experts,
        moe_layers=shape.moe_layers,
        routes=routes,
        keys=process.keys,
        timeout_s=config.rollout.timeout_s,
        log_path=process.log_path,
    )


@contextlib.contextmanager
def _processes(
    config: Config, servers: list[SGLangServer], gpus: int
) -> Iterator[tuple[Sequence[ServerProcess], list[str] | None]]:
    """Ray up and the servers started: as children of this process where there are no GPUs, or too few for both engines;
    else by Ray, on GPUs and nodes of their own.

    Yields the servers, and in the second case the node of each trainer rank. All is gone on leaving.
    """
    with contextlib.ExitStack() as stack:
        ray_up = ray_session(config.cluster, cpus=config.parallel.ranks + 1)
        if config.cluster.address is None and (not gpus or shares_gpus(config, gpus)):
            for server in servers:
                stack.callback(server.stop)
                server.start()  # it loads while Ray and the trainer do
            stack.enter_context(ray_up)
            yield servers, None
            return
        stack.enter_context(ray_up)
        placement = wait_and_place(
            config.parallel.ranks,
            [server.config.tensor_parallel for server in servers],
            gpus=gpus > 0,
            timeout_s=config.cluster.join_timeout_s,
            machines=config.cluster.nodes if config.cluster.address is not None else 1,
        )
        remote = _on_nodes(config, servers, placement, gpus)
        for server in remote:
            stack.callback(server.stop)
        for server in remote:
            server.start()
        yield remote, placement.trainers


def _on_nodes(config: Config, servers: list[SGLangServer], placement: Placement, gpus: int) -> list[RemoteServer]:
    """The servers, each for the nodes where it is placed, or others where one is lost; not started."""
    sizes = [server.config.tensor_parallel for server in servers]

    def another(number: int) -> tuple[str, ...] | None:
        nodes = other_nodes(ray.nodes(), placement, number, sizes, gpus=gpus > 0)
        if nodes is not None:
            placement.servers[number] = nodes
        return nodes

    return [
        RemoteServer(
            server,
            placement.servers[number],
            gpus=gpus > 0,
            reachable=config.cluster.address is not None,
            another=functools.partial(another, number),
        )
        for number, server in enumerate(servers)
    ]


def server_count(config: Config, gpus: int) -> int:
    """How many servers the run has: see ServerConfig.replicas. gpus: of this machine; 0: the run uses none.

    Raises ServerError where several of them are to listen on one port of this machine.
    """
    if config.server.replicas is not None or not gpus:
        count = config.server.replicas or 1
    else:
        beside = config.rollout_gpus
        if config.cluster.address is None:
            beside = gpus - config.parallel.ranks * (not config.cluster.colocated) - config.teacher_gpus
        per_node = gpus if config.cluster.address is None else config.cluster.gpus_per_node
        count = max(1, servers_beside(beside, config.server.tensor_parallel, per_node))
    if count > 1 and config.server.port is not None and config.cluster.address is None:
        raise ServerError(
            f"{count} servers on one machine cannot all listen on port {config.server.port}; set server.port=null, "
            "which gives each a free one, or server.replicas=1"
        )
    return count


def sampler_count(config: Config, servers: int) -> int:
    """How many sampler processes the run has: see RolloutConfig.samplers."""
    if config.rollout.samplers == "auto":
        return servers if servers > 1 and config.cluster.address is not None else 0
    return min(config.rollout.samplers, servers)


def shares_gpus(config: Config, gpus: int) -> bool:
    """Whether trainer and servers run on the same GPUs of this machine, by turns or because it has too few for both."""
    if config.cluster.colocated:
        return gpus > 0
    needed = config.parallel.ranks + server_count(config, gpus) * config.server.tensor_parallel + config.teacher_gpus
    return config.cluster.address is None and gpus < needed


def weights_config(config: Config, gpus: int) -> WeightsConfig:
    """How weights travel. Servers on GPUs of their own see no others, so they cannot map a trainer's memory, even on
    its machine: there `auto` is a process group."""
    if config.weights.transport != "auto" or not gpus or shares_gpus(config, gpus):
        return config.weights
    return config.weights.model_copy(update={"transport": "distributed"})
