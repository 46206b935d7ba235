"""What a built model really holds: parameters by kind, bytes of its states, and of what forward keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
from tests.support.tiny_families import DENSE_FAMILIES, FAMILIES, tiny_config


def configs() -> dict[str, dict[str, Any]]:
    """A config.json of each kind of model there is."""
    tiny = {name: tiny_config(name) for name in (*FAMILIES, *DENSE_FAMILIES)}
    tiny["kimi_k2"] = tiny["moonlight"] | {"model_type": "kimi_k2"}
    sparse = tiny["qwen3_moe with dense layers"]
    tiny["qwen3_moe"] = sparse | {"mlp_only_layers": []}
    return tiny


@dataclass(frozen=True)
class States:
    """Of one rank. dense, expert: parameters by where their gradients are reduced. Elsewhere bytes; `padded` is what
    the gradients' buffers take."""

    stage: int
    dense: int
    expert: int
    critic: int
    buffers: int
    weights: int
    gradients: int
    padded: int
    optimizer: int


def states(parallel: ParallelConfig, precision: TrainerPrecision, models: list[dict[str, Any]]) -> list[States]:
    """Runs on a rank."""
    from megatron_ext.mcore import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    return [_states(hf, parallel, precision, stage) for hf in models]


def _states(hf, parallel, precision, stage) -> States:
    import torch

    from megatron_ext.hf.description import describe
    from megatron_ext.network import Network

    model = describe(hf)
    network = Network(model, parallel, TrainerConfig(), precision, replay=False)
    network.restart_optimizer(OptimizerConfig())
    network.optimizer.step()  # on gradients of 0; it makes the moments
    parameters = [p for chunk in network.chunks for p in chunk.parameters()]
    # tables of angles are made anew as sequences grow; they are not the model's
    buffers = [b for c in network.chunks for name, b in c.named_buffers() if "rotary" not in name]
    weight_storages = {p.untyped_storage().data_ptr() for p in parameters}
    optimizer = 0
    for one in getattr(network.optimizer, "chained_optimizers", [network.optimizer]):
        for group in one.optimizer.param_groups:
            for p in group["params"]:
                if p.untyped_storage().data_ptr() not in weight_storages:
                    optimizer += p.nbytes
                optimizer += sum(s.nbytes for s in one.optimizer.state[p].values() if torch.is_tensor(s))
    critic = Network(model, parallel, TrainerConfig(), precision, head="value", trainable=False)
    return States(
        stage=stage,
        dense=sum(p.numel() for p in parameters if getattr(p, "allreduce", True)),
        expert=sum(p.numel() for p in parameters if not getattr(p, "allreduce", True)),
        critic=sum(p.numel() for chunk in critic.chunks for p in chunk.parameters()),
        buffers=sum(b.numel() for b in buffers),
        weights=sum(t.nbytes for t in (*parameters, *buffers)),
        gradients=sum(p.main_grad.nbytes for p in parameters),
        padded=sum(b.grad_data.nbytes for m in network.models for b in (*m.buffers, *m.expert_parallel_buffers)),
        optimizer=optimizer,
    )


def kept_bytes(parallel: ParallelConfig, trainer: TrainerConfig, models: list[dict[str, Any]], samples) -> list[int]:
    """Runs on a rank: bytes of every storage that forward keeps for backward, the weights and the head's logits aside,
    of layers that are torch's alone, as they are in bfloat16 and on a GPU."""
    from megatron_ext.cpu import row_functions
    from megatron_ext.logprobs import sizes

    row_functions.plain = lambda *_: False
    sizes.KEPT["cpu"] = 0
    return [_kept(hf, parallel, trainer, samples) for hf in models]


def _kept(hf, parallel, trainer, samples) -> int:
    import torch

    from megatron_ext.hf.description import describe
    from megatron_ext.network import Network

    network = Network(describe(hf), parallel, trainer, TrainerPrecision(), replay=False)
    network.restart_optimizer(OptimizerConfig())
    weights = {t.untyped_storage().data_ptr() for c in network.chunks for t in (*c.parameters(), *c.buffers())}
    kept: dict[int, torch.Tensor] = {}
    forward = True

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if forward and storage not in weights:
            kept[storage] = tensor
        return tensor

    def loss(batch, quantities):
        nonlocal forward
        forward = False
        return quantities[0].sum(), {}

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.step(samples, loss, "native")
    return sum(t.untyped_storage().nbytes() for t in kept.values())
