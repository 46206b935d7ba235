"""What it costs that trainer and servers take turns on the same GPUs (`cluster.colocated`, docs/colocated.md).

    to the trainer    weights and Adam's states come from the machine's memory
    to the servers    Adam's states go there; the servers take back their weights' memory, and all weights go from the
                      rank that gathers them to each server over NVLink; the trainer's weights go there too

Gradients, the servers' weights and their caches do not move: zeros, a transfer and nothing take their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.plan.hardware import GIB, GPU, Efficiency
from pipeline.plan.memory import Memory


@dataclass(frozen=True)
class Turns:
    """Of the trainer rank that holds most. weights: bytes of all its models' weights, which have a place beside a
    server too while they are written or sent. host: bytes of its machine's memory that moves keep, page-locked.
    moved: bytes over PCIe in a step, both ways together. moves_s: seconds of that."""

    weights: float
    host: float
    moved: float
    moves_s: float


def turns_of(config: Config, memory: Memory, card: GPU) -> Turns:
    """A critic and a reference are as large as the policy, nearly: they have another head or no states. Where adapters
    are trained all three have the model in common, and the adapters of the others count for nothing here."""
    objective = config.objective.composition()
    networks = 1 if config.lora is not None else 1 + objective.needs_reference + objective.needs_critic
    weights = memory.weights * networks
    kept = weights + memory.optimizer * (1 + objective.needs_critic)
    return Turns(weights, kept, 2 * kept, 2 * kept / card.pcie)


def sent_s(weight_bytes: float, servers: int, card: GPU, efficiency: Efficiency) -> float:
    """Of one rank's memory to all servers of its machine, each of which reads all of it."""
    return weight_bytes * servers / (card.nvlink * efficiency.network)


def too_little(turns: Turns, memory: Memory, static: float, card: GPU, efficiency: Efficiency) -> Iterator[str]:
    """Sentences that say what does not fit because of turns. static: a server's share of a GPU."""
    beside, held = turns.weights + efficiency.asleep, turns.host + memory.host
    if (needed := beside + static * card.memory) > card.memory:
        yield (
            f"in the servers' turn, {static:g} of a GPU, the trainer's {turns.weights / GIB:.1f} GiB of weights need a "
            f"place too (a model that is written, a server that was started again): {needed / GIB:.1f} GiB of the "
            f"{card.name}'s {card.memory / GIB:.1f}; server.mem_fraction_static={1 - beside / card.memory:.2f} leaves "
            "it"
        )
    if held > card.host:
        yield (
            f"what a rank has in its machine's memory in the servers' turn takes {held / GIB:.0f} GiB, of "
            f"{card.host / GIB:.0f} a GPU"
        )
