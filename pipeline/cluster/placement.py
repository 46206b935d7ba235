"""Which Ray node each trainer rank and each rollout server runs on, in a cluster that is already there.

A node says what it is for by a custom resource, `ray start --resources '{"trainer": 8}'` or `'{"rollout": 8}'`: so many
processes of that kind, a GPU each where there are GPUs. scripts/slurm/ray_node.sh does so. Where no node does, trainer
ranks and servers share all nodes, and a node has as many slots as GPUs, or as CPUs where the run needs none.

Ranks fill one node after the other, so that neighbours (tensor and expert parallel groups) share a node. Servers are
spread over the nodes that have room, so that the loss of one costs as few as possible; one whose node is gone moves to
another that has room, then or later. A server that no node holds whole spans the fewest that do, with the same share on
each, and moves as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.server import nodes_of_server
from pipeline.errors import SamerouteError

_POLL_S = 0.5
_KINDS = ("trainer", "rollout")


class PlacementError(SamerouteError):
    """The Ray cluster is too small for the run; the message says what it has and what is needed."""


@dataclass(frozen=True)
class Placement:
    """Ray node ids: of every trainer rank, in rank order, and of every server, which may change: mostly one, or all
    that it spans, of which the first answers HTTP."""

    trainers: list[str]
    servers: list[tuple[str, ...]]


def place(nodes: Sequence[Mapping[str, Any]], ranks: int, servers: Sequence[int], *, gpus: bool) -> Placement:
    """Fill the nodes with ranks in the order they are given; each server on the nodes that have the fewest.

    nodes: as ray.nodes() gives them. servers: GPUs (or processes) of each server. Raises PlacementError where they do
    not fit.
    """
    free_trainer, free_rollout = _slots(nodes, gpus=gpus)
    largest = max(free_rollout.values(), default=0)
    has = (
        f"{sum(free_trainer.values())} trainer and {sum(free_rollout.values())} rollout slots"
        if free_rollout is not free_trainer
        else f"{sum(free_trainer.values())} {'GPU' if gpus else 'CPU'}s"
    )
    trainers, placed = list[str](), list[tuple[str, ...]]()
    for size in [1] * ranks + list(servers):
        of_rank = len(trainers) < ranks
        free = free_trainer if of_rank else free_rollout
        taken = _take(free, size, 1 if of_rank else _span(size, largest), () if of_rank else sum(placed, ()))
        if taken is None:
            raise PlacementError(
                f"the Ray cluster has {has} on {len(free_trainer)} nodes, which do not hold parallel.ranks={ranks} and "
                f"{len(servers)} servers of server.tensor_parallel={max(servers, default=0)} each"
                f"{_shares(max(servers, default=0), largest)}; change those, or the nodes of the job"
            )
        if of_rank:
            trainers += taken
        else:
            placed.append(taken)
    return Placement(trainers, placed)


def _take(free: dict[str, int], size: int, span: int, beside: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Nodes for something of so many slots on `span` nodes, which have them no longer; of those with room the ones that
    stand in `beside` least often. None: there are too few."""
    share = size // span
    fitting = sorted((node for node, left in free.items() if left >= share), key=beside.count)[:span]
    if len(fitting) < span:
        return None
    for node in fitting:
        free[node] -= share
    return tuple(fitting)


def _span(size: int, largest: int) -> int:
    """Nodes of a server. largest: slots of the node that has most. Raises PlacementError where it does not divide."""
    try:
        return nodes_of_server(size, largest)
    except ValueError as error:
        raise PlacementError(str(error)) from error


def _shares(size: int, largest: int) -> str:
    span = _span(size, largest)
    return "" if span == 1 else f", {size // span} on each of {span} nodes"


def _slots(nodes: Sequence[Mapping[str, Any]], *, gpus: bool) -> tuple[dict[str, int], dict[str, int]]:
    """For ranks and for servers, by node of those that are alive; one and the same dict where they share the nodes."""
    alive = [n for n in nodes if n["Alive"]]
    apart = any(kind in n["Resources"] for n in alive for kind in _KINDS)
    unit = "GPU" if gpus else "CPU"
    trainer, rollout = (
        {n["NodeID"]: int(n["Resources"].get(kind if apart else unit, 0)) for n in alive} for kind in _KINDS
    )
    return trainer, rollout if apart else trainer


def other_nodes(
    nodes: Sequence[Mapping[str, Any]], placement: Placement, number: int, sizes: Sequence[int], *, gpus: bool
) -> tuple[str, ...] | None:
    """For a server of which a node is gone: those with the room that the ranks and the other servers leave, None where
    there are too few.

    nodes, sizes: as `place` takes them, the nodes as they are now. number: of the server.
    """
    of_ranks, free = _slots(nodes, gpus=gpus)
    beside = list[str]()
    for other, (placed, size) in enumerate(zip(placement.servers, sizes, strict=True)):
        for node in placed if other != number else ():
            beside.append(node)
            if node in free:
                free[node] -= size // len(placed)
    for node in placement.trainers if of_ranks is free else ():
        if node in free:
            free[node] -= 1
    return _take(free, sizes[number], len(placement.servers[number]), beside)


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
