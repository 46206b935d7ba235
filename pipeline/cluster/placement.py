"""Which Ray node each trainer rank and each rollout server runs on, in a cluster that is already there.

A node says what it is for by a custom resource, `ray start --resources '{"trainer": 8}'` or `'{"rollout": 8}'`: so many
processes of that kind, a GPU each where there are GPUs. scripts/slurm/ray_node.sh does so. Where no node does, trainer
ranks and servers share all nodes, and a node has as many slots as GPUs, or as CPUs where the run needs none.

Ranks fill one node after the other, so that neighbours (tensor and expert parallel groups) share a node. Servers are
spread over the nodes that have room, so that the loss of one costs as few as possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import SamerouteError

_POLL_S = 0.5
_KINDS = ("trainer", "rollout")


class PlacementError(SamerouteError):
    """The Ray cluster is too small for the run; the message says what it has and what is needed."""


@dataclass(frozen=True)
class Placement:
    """Ray node ids: of every trainer rank, in rank order, and of every server."""

    trainers: list[str]
    servers: list[str]


def place(nodes: Sequence[Mapping[str, Any]], ranks: int, servers: Sequence[int], *, gpus: bool) -> Placement:
    """Fill the nodes with ranks in the order they are given; each server on the node that has the fewest.

    nodes: as ray.nodes() gives them. servers: GPUs (or processes) of each server; one never spans nodes.
    Raises PlacementError where they do not fit.
    """
    alive = [n for n in nodes if n["Alive"]]
    unit = "GPU" if gpus else "CPU"
    apart = any(kind in n["Resources"] for n in alive for kind in _KINDS)

    def slots(kind: str) -> dict[str, int]:
        return {n["NodeID"]: int(n["Resources"].get(kind if apart else unit, 0)) for n in alive}

    free_trainer = slots("trainer")
    free_rollout = slots("rollout") if apart else free_trainer
    has = (
        f"{sum(free_trainer.values())} trainer and {sum(free_rollout.values())} rollout slots"
        if apart
        else f"{sum(free_trainer.values())} {unit}s"
    )

    def take(free: dict[str, int], count: int, beside: Sequence[str] = ()) -> str:
        fitting = [node for node, left in free.items() if left >= count]
        if fitting:
            node = min(fitting, key=beside.count)
            free[node] -= count
            return node
        raise PlacementError(
            f"the Ray cluster has {has} on {len(alive)} nodes, which do not hold parallel.ranks={ranks} and "
            f"{len(servers)} servers of server.tensor_parallel={max(servers, default=0)} each; change those, or the "
            "nodes of the job"
        )

    trainers, placed = [take(free_trainer, 1) for _ in range(ranks)], list[str]()
    for size in servers:
        placed.append(take(free_rollout, size, placed))
    return Placement(trainers, placed)


def wait_and_place(
    ranks: int,
    servers: Sequence[int],
    *,
    gpus: bool,
    timeout_s: float,
    machines: int = 1,
    nodes: Callable[[], list[Any]] = ray.nodes,
) -> Placement:
    """`place` on the cluster that this process has joined, once enough nodes have joined too; the head node is first.

    machines: that the cluster will have; they are waited for, so that servers are spread over all of them. Those that
    have been lost since count. Raises PlacementError when too few are there after timeout_s seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = sorted(nodes(), key=lambda n: ("node:__internal_head__" not in n["Resources"], n["NodeManagerAddress"]))
        late = time.monotonic() > deadline
        if late or len(found) >= machines:
            try:
                return place(found, ranks, servers, gpus=gpus)
            except PlacementError:
                if late:
                    raise
        time.sleep(_POLL_S)


def on_node(node: str | None) -> dict[str, Any]:
    """Options of a Ray actor that must run there; None: anywhere."""
    return {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
