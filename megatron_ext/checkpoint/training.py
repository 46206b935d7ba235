"""A training checkpoint: all that a trainer needs to go on, in a directory that is also a checkpoint of its policy.

Megatron-Core's dist checkpoint of `shards.py`, and in it, beside the policy's weights under their own keys:

    optimizer.state.*      fp32 weights and both Adam moments of every parameter, in the parameter's own shape
    critic.*, reference.*  the same of a critic; the weights of a reference
    rng/*                  the random-number generators of each rank
    checksums.json         bytes and CRC-32 of every file

Of a network with adapters (`megatron_ext.lora`), its trained parameters stand in the place of the weights, and
`lora.json` says which model they are added to.

The optimizer is saved `fully_reshardable`: any layout reads what any other wrote. Generators belong to a rank, so they
come back in the layout that saved them; another one goes on with its own.
"""

from __future__ import annotations

import json
import logging
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext import cpu
from megatron_ext.checkpoint.names import CHECKSUMS, CheckpointError
from megatron_ext.checkpoint.plain import plain_data
from megatron_ext.checkpoint.shards import LoadInPlace, check_files, check_model, sharded_state
from megatron_ext.checkpoint.staged_save import StagedSave
from megatron_ext.lora.origin import LORA, Origin, read_origin, write_origin
from megatron_ext.mcore import (
    ShardedObject,
    add_prefix_for_sharding,
    dist_checkpointing,
    get_cuda_rng_tracker,
    load_common_state_dict,
    parallel_state,
)
from megatron_ext.network import Network

_BLOCK = 1 << 24

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Networks:
    """What a trainer holds. The policy's keys have no prefix, so that a reader of models finds it."""

    policy: Network
    critic: Network | None
    reference: Network | None

    def items(self) -> list[tuple[str, Network]]:
        everything = (("policy", self.policy), ("critic", self.critic), ("reference", self.reference))
        return [(name, network) for name, network in everything if network is not None]


def begin_save(path: Path, networks: Networks) -> StagedSave:
    """Copy everything to host memory; a thread writes it into `path`, an empty directory that every rank sees.

    All ranks call it together. For what comes then see StagedSave.
    """
    state: dict[str, Any] = {"rng": _rng_object(_rng_state())}
    common: dict[str, Any] = {"world": dist.get_world_size(), "layout": _layout(networks.policy), "networks": {}}
    live: set[int] = set()
    for name, network in networks.items():
        live |= {t.untyped_storage().data_ptr() for chunk in network.chunks for t in chunk.state_dict().values()
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        state[name], common["networks"][name] = _network_state(name, network, loading=False)
    state["common"] = common
    origin = networks.policy.origin
    return StagedSave(state, path, live, finished=lambda sums: _write_checksums(path, sums, origin))


def load(path: Path, networks: Networks) -> None:
    """Restore everything. The networks are built, their optimizers begun. All ranks call it together.

    Raises CheckpointError, on every rank, where a file is damaged or what is in it is of another model.
    """
    verify(path)
    check_files(path)
    with plain_data(path):
        common = load_common_state_dict(str(path))["common"]
    stored, wanted = set(common["networks"]), {name for name, _ in networks.items()}
    if absent := wanted - stored:
        raise CheckpointError(f"{path} holds no {' and no '.join(sorted(absent))}")
    check_origin(path, networks.policy.origin)
    policy = _sharded(networks.policy)
    check_model(path, [entry for chunk in policy.values() for entry in chunk.values()])
    same_layout = common["layout"] == _layout(networks.policy)
    state: dict[str, Any] = {"rng": _rng_object(None)} if same_layout else {}
    for name, network in networks.items():
        counts = common["networks"][name]
        state[name], _ = _network_state(name, network, loading=True, stepped=bool(counts.get("adam_steps")))
    with plain_data(path):
        loaded = dist_checkpointing.load(state, str(path), LoadInPlace())
    for name, network in networks.items():
        _restore_network(network, loaded[name], common["networks"][name])
    if same_layout:
        _set_rng_state(loaded["rng"])
    elif dist.get_rank() == 0:
        log.warning("%s was saved in another layout: random-number generators go on with their own state", path)


def check_origin(path: Path, origin: Origin | None) -> None:
    """Raise CheckpointError where adapters are of another kind, or of another model, than here."""
    try:
        stored = read_origin(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if origin is None or stored is None:
        if origin is not stored:
            held, wanted = ("a whole model", "adapters") if stored is None else ("adapters", "a whole model")
            raise CheckpointError(f"{path} holds {held}; {wanted} would be trained")
        return
    for name, mine, theirs in (
        ("rank", origin.lora.rank, stored.lora.rank),
        ("alpha", origin.lora.alpha, stored.lora.alpha),
    ):
        if mine != theirs:
            raise CheckpointError(f"{path} holds adapters of {name} {theirs}, and {name} {mine} is trained")
    if origin.fingerprint != stored.fingerprint:
        raise CheckpointError(
            f"{path} holds adapters of the model that was {stored.base}, whose weights are others than those of "
            f"{origin.base}"
        )


def _sharded(network: Network) -> dict[str, Any]:
    return dict(sharded_state(network.chunks, trained=network.lora is not None))


def _layout(network: Network) -> dict[str, Any]:
    return network.parallel.model_dump()


def _network_state(
    name: str, network: Network, *, loading: bool, stepped: bool | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Shards of one network, and its counters. stepped: whether its optimizer has moments; None: look."""
    state = _sharded(network)
    counts: dict[str, int] = {}
    if network.trainable:
        counts = {"steps": network.steps, "adam_steps": _adam_steps(network)}
        if counts["adam_steps"] if stepped is None else stepped:
            metadata = {
                "distrib_optim_sharding_type": "fully_reshardable",
                # Gathered over gloo into the memory of one host, not of every GPU.
                "distrib_optim_fully_reshardable_mem_efficient": True,
                "chained_optim_avoid_prefix": True,
                "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            }
            model, state["optimizer"] = dict(state), {}
            for i, optimizer in enumerate(_chained(network)):
                if loading:
                    optimizer.load_state_dict(optimizer.state_dict())  # allocates the moments
                # Not sharded_state_dict: of what that adds only the step count is state, and it collects garbage twice.
                if moments := optimizer.sharded_param_state_fully_reshardable(model, loading, metadata):
                    state["optimizer"][str(i)] = moments
    if name != "policy":
        add_prefix_for_sharding(state, f"{name}.")
    return state, counts


def _restore_network(network: Network, loaded: dict[str, Any], counts: dict[str, int]) -> None:
    for i, chunk in enumerate(network.chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)  # without _extra_state
    if not network.trainable:
        return
    network.steps = counts["steps"]
    if not counts["adam_steps"]:
        network.optimizer.reload_model_params()
        return
    for i, optimizer in enumerate(_chained(network)):
        if moments := loaded.get("optimizer", {}).get(str(i)):  # else this stage has no parameter of that kind
            state = optimizer.state_dict()
            for group in state["optimizer"]["param_groups"]:
                group["step"] = counts["adam_steps"]
            optimizer.load_state_dict(
                state | {"param_state": moments, "param_state_sharding_type": "fully_reshardable"}
            )
        for group in optimizer.optimizer.param_groups:
            group["step"] = counts["adam_steps"]


def _chained(network: Network) -> list[Any]:
    """The distributed optimizers of this stage: of experts, and of everything else."""
    chained = getattr(network.optimizer, "chained_optimizers", [network.optimizer])
    return [optimizer for optimizer in chained if not optimizer.is_stub_optimizer]


def _adam_steps(network: Network) -> int:
    """Updates that were made, over all ranks: a stage without experts has no group that counts for them."""
    inner = [o.optimizer for o in _chained(network)]
    counts = [g.get("step", 0) for o in inner for g in o.param_groups]
    counts += [s["step"] for o in inner for s in o.state.values() if "step" in s]  # of an offloaded one, by parameter
    mine = max(map(int, counts), default=0)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return max(everyone)


def _rng_state() -> dict[str, Any]:
    """Of every generator that a rank draws from, in types that torch loads without running code."""
    kind, words, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": None if cpu.needed() else torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and not cpu.needed():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _rng_object(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _write_checksums(path: Path, sums: dict[str, tuple[int, int]], origin: Origin | None) -> None:
    """On the first rank, when everything else is written. sums: name -> (bytes, CRC-32) of the ranks' files."""
    if origin is not None:
        write_origin(path, origin)
    for name in ("metadata.json", ".metadata", *([LORA] if origin is not None else [])):
        sums[name] = checksum(path / name)
    (path / CHECKSUMS).write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n")


def checksum(file: Path) -> tuple[int, int]:
    """(bytes, CRC-32)."""
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def verify(path: Path) -> None:
    """Read every file back, each rank its share. Raises CheckpointError on all of them, naming what is damaged."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _damaged(path, dist.get_rank(), dist.get_world_size()))
    if problems := sorted({problem for found in everyone for problem in found}):
        raise CheckpointError("; ".join(problems))


def _damaged(path: Path, rank: int, world: int) -> list[str]:
    """What is wrong with this rank's share of the files, a sentence each."""
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return [f"{path / CHECKSUMS} cannot be read: {error}"]
    problems = []
    for name in sorted(expected)[rank::world]:
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif list(checksum(file)) != expected[name]:
            problems.append(f"{file} is damaged: its bytes are not those that were written")
    return problems
