"""Which GPUs the engines take where one machine runs them all and no Ray cluster is joined.

The trainer's ranks take the first GPUs, one each. Where the machine has enough for both engines, Ray places the servers
on the others. Where it has not, they share: servers are placed from the last GPU downwards, each on GPUs that no other
server has, so that as few as possible are the trainer's too. Where they take turns (`cluster.colocated`), they share
whatever the machine has.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cluster.placement import PlacementError
from pipeline.config import Config
from pipeline.config.run import COLOCATED_FRACTION
from pipeline.errors import NOT_STARTED

SHARED_FRACTION = 0.3
"""Of a GPU's memory, for the weights and the cache of a server that runs beside a trainer rank. SGLang's own choice is
most of it. The trainer needs 18 bytes a parameter and its activations, a server 2 and its cache."""


class TooFewGPUs(PlacementError):
    """An engine of the run does not fit on this machine, found before anything was started."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class ServerPlace:
    """base: the first of a server's GPUs, counted among those that this process sees. shared: whether a trainer rank
    has one of them too."""

    base: int
    shared: bool


def check_gpus(config: Config, gpus: int) -> None:
    """Raise TooFewGPUs where this machine has too few GPUs for one of the engines. gpus: that it has.

    Ray would wait for the missing ones without a word. A joined cluster's GPUs are not this machine's: nothing is
    checked there.
    """
    if config.cluster.address is not None:
        return
    has = f"this machine has {gpus} GPU{'' if gpus == 1 else 's'}"
    if gpus == 0:
        raise TooFewGPUs(f"{has}, as torch sees it, and the run asks for device=cuda; set device=cpu")
    if config.parallel.ranks > gpus:
        raise TooFewGPUs(
            f"{has} and parallel.ranks={config.parallel.ranks} takes one each; set parallel.ranks to {gpus} or fewer, "
            "or cluster.address to that of a Ray cluster that has more"
        )
    if config.train.steps and config.server.tensor_parallel > gpus:
        raise TooFewGPUs(
            f"{has} and a server of server.tensor_parallel={config.server.tensor_parallel} takes so many; set that to "
            f"{gpus} or fewer, or cluster.address to that of a Ray cluster, where a server spans nodes"
        )


def places_of_servers(config: Config, gpus: int, servers: int) -> list[ServerPlace]:
    """Where each server runs on a machine whose GPUs both engines share.

    Raises PlacementError where the servers would have to share GPUs among themselves.
    """
    size = config.server.tensor_parallel
    if servers * size > gpus:
        raise PlacementError(
            f"this machine has {gpus} GPUs and {servers} servers of server.tensor_parallel={size} take "
            f"{servers * size}; set server.replicas to {gpus // size} or fewer"
        )
    bases = [gpus - size * (number + 1) for number in range(servers)]
    return [ServerPlace(base, shared=base < config.parallel.ranks) for base in bases]


def memory_share(config: Config, place: ServerPlace) -> float | None:
    """The server's mem_fraction_static: the configured one, or that beside a trainer. None: SGLang's own choice."""
    own = config.server.mem_fraction_static
    given = own is not None or any(argument.startswith("--mem-frac") for argument in config.server.extra_args)
    if given or not place.shared:
        return own
    return COLOCATED_FRACTION if config.cluster.colocated else SHARED_FRACTION
