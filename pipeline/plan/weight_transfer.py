"""How long the weights take to the servers: each sender has an adapter, and so has each GPU of a server's machine.

    seconds = max(bytes of the sender that sends most, bytes of all / adapters that a machine takes them in by) / rate

The group of a sender crosses the network once into each machine of servers and goes on from GPU to GPU within it. So a
machine takes the whole model in, by as many adapters as there are senders, or as it has GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import ParallelConfig
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.senders.assignment import Place, Unit, assign, choose_senders, holds_its_own
from pipeline.config import Config
from pipeline.plan.counts.parameters import layer, rank_count, stage_layers, total
from pipeline.plan.hardware import GPU, Efficiency
from pipeline.plan.memory import item_bytes


@dataclass(frozen=True)
class WeightTransfer:
    """nbytes: of all. senders: trainer ranks. by_sender: bytes of the one that sends most."""

    nbytes: float
    senders: int
    by_sender: float
    seconds: float


def weight_transfer(config: Config, model: ModelDescription, card: GPU, efficiency: Efficiency) -> WeightTransfer:
    """On GPUs of their own; where engines share GPUs, rank 0 sends all."""
    nbytes, alone = float(item_bytes(config.precision)) * total(model), config.cluster.colocated
    limit = 1 if alone or config.weights.transport == "shared_memory" else config.weights.senders
    by_sender = bytes_by_sender(config.parallel, model, item_bytes(config.precision), limit)
    taken_by = min(len(by_sender), config.cluster.gpus_per_node)
    slowest = max(max(by_sender), nbytes / taken_by)
    return WeightTransfer(nbytes, len(by_sender), max(by_sender), slowest / (card.network * efficiency.network))


def bytes_by_sender(parallel: ParallelConfig, model: ModelDescription, item: float, limit: int) -> list[float]:
    """As a trainer of this layout divides them: layers here, single tensors there."""
    places = _places(parallel)
    senders = choose_senders(places, limit)
    units = [u for stage in range(parallel.pipeline) for u in _units(parallel, model, places, senders, stage)]
    return [item * sum(unit.nbytes for unit in mine) for mine in assign(units, places, senders).values()]


def _places(parallel: ParallelConfig) -> list[Place]:
    """Of every rank, as Megatron-Core numbers them: tensor ranks first, then expert ranks, stages last."""
    a_stage, tensor = parallel.ranks // parallel.pipeline, parallel.expert_tensor or parallel.tensor
    return [Place(r, r // a_stage, r % a_stage // tensor % parallel.expert) for r in range(parallel.ranks)]


def _units(
    parallel: ParallelConfig, model: ModelDescription, places: list[Place], senders: list[int], stage: int
) -> Iterator[Unit]:
    """Of a stage; their sizes are parameters."""
    whole = parallel.model_copy(update={"tensor": 1, "expert": 1, "expert_tensor": 1})
    layers = [layer(model, number, whole) for number in stage_layers(model, parallel, stage)]
    yield Unit(stage, (), rank_count(model, whole, stage).dense - sum(each.dense for each in layers))
    own = holds_its_own(stage, places, senders)
    for each in layers:
        yield Unit(stage, (), each.dense)
        for rank in range(parallel.expert if each.expert else 0):
            yield Unit(stage, (), each.expert // parallel.expert, rank if own else None)
