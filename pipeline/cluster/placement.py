"""Which Ray node each trainer rank and each rollout server runs on, in a cluster that is already there.

A node says what it is for by a custom resource, `ray start --resources '{"trainer": 8}'` or `'{"rollout": 8}'`: so many
processes of that kind, a GPU each where there are GPUs. scripts/slurm/ray_node.sh does so. Where no node does, trainer
ranks and servers share all nodes, and a node has as many slots as GPUs, or as CPUs where the run needs none.

Ranks fill one node after the other, so that neighbours (tensor and expert parallel groups) share a node. Servers are
spread over the nodes that have room, so that the loss of one costs as few as possible; one whose node is gone moves to
another that has room, then or later.
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
    """Ray node ids: of every trainer rank, in rank order, and of every server, which may change."""

    trainers: list[str]
    servers: list[str]


def place(nodes: Sequence[Mapping[str, Any]], ranks: int, servers: Sequence[int], *, gpus: bool) -> Placement:
    """Fill the nodes with ranks in the order they are given; each server on the node that has the fewest.

    nodes: as ray.nodes() gives them. servers: GPUs (or processes) of each server; one never spans nodes.
    Raises PlacementError where they do not fit.
    """
    free_trainer, free_rollout = _slots(nodes, gpus=gpus)
    has = (
        f"{sum(free_trainer.values())} trainer and {sum(free_rollout.values())} rollout slots"
        if free_rollout is not free_trainer
        else f"{sum(free_trainer.values())} {'GPU' if gpus else 'CPU'}s"
    )

    def take(free: dict[str, int], count: int, beside: Sequence[str] = ()) -> str:
        fitting = [node for node, left in free.items() if left >= count]
        if fitting:
            node = min(fitting, key=beside.count)
            free[node] -= count
            return node
        raise PlacementError(
            f"the Ray cluster has {has} on {len(free_trainer)} nodes, which do not hold parallel.ranks={ranks} and "
            f"{len(servers)} servers of server.tensor_parallel={max(servers, default=0)} each; change those, or the "
            "nodes of the job"
        )

    trainers, placed = [take(free_trainer, 1) for _ in range(ranks)], list[str]()
    for size in servers:
        placed.append(take(free_rollout, size, placed))
    return Placement(trainers, placed)


def _slots(nodes: Sequence[Mapping[str, Any]], *, gpus: bool) -> tuple[dict[str, int], dict[str, int]]:
    """For ranks and for servers, by node of those that are alive; one and the same dict where they share the nodes."""
    alive = [n for n in nodes if n["Alive"]]
    apart = any(kind in n["Resources"] for n in alive for kind in _KINDS)
    unit = "GPU" if gpus else "CPU"
    trainer, rollout = (
        {n["NodeID"]: int(n["Resources"].get(kind if apart else unit, 0)) for n in alive} for kind in _KINDS
    )
    return trainer, rollout if apart else trainer


def another_node(
    nodes: Sequence[Mapping[str, Any]], placement: Placement, number: int, sizes: Sequence[int], *, gpus: bool
) -> str | None:
    """For a server whose own node is gone: one with the room that the ranks and the other servers leave, None where
    there is none.

    nodes, sizes: as `place` takes them, the nodes as they are now. number: of the server.
    """
    of_ranks, free = _slots(nodes, gpus=gpus)
    others = [placed for i, placed in enumerate(zip(placement.servers, sizes, strict=True)) if i != number]
    ranks = [(node, 1) for node in placement.trainers] if of_ranks is free else []
    for node, size in others + ranks:
        if node in free:
            free[node] -= size
    fitting = [node for node, left in free.items() if left >= sizes[number]]
    return min(fitting, key=[node for node, _ in others].count, default=None)


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


def on_node(node: str | None, *, or_elsewhere: bool = False) -> dict[str, Any]:
    """Options of a Ray actor that must run there; None: anywhere. or_elsewhere: only while the node lives."""
    return {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=or_elsewhere)}
