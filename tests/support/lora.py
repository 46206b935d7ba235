"""Trainers with adapters, on every rank: what they compute, what they send, and their gradients, whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ext.config import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_update
from tests.support.jobs import joined, weighted_likelihood
from tests.support.ranks import run_ranks

Tensors = dict[str, np.ndarray]


def stir(trainer, seed: int = 7) -> None:
    """Give every B values, from its name alone, so that each layout has the same."""
    import zlib

    import torch

    from megatron_ext.lora.attach import adapters_of
    from megatron_ext.lora.targets import layer_name

    for adapter in adapters_of(trainer.policy.chunks):
        for i, match in enumerate(adapter.matches):
            key = zlib.crc32(f"{seed}{layer_name(match)}{match.expert}".encode())
            shape = list(adapter.B.shape[1:])
            cut = adapter.kind == "column"
            shape[1] *= adapter.ways if cut else 1
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(key)) * 0.05
            mine = whole.chunk(adapter.ways, 1)[adapter.rank] if cut else whole
            with torch.no_grad():
                masked = mine.flatten(0, 1)
                if adapter.one_hot is not None:
                    masked = masked * adapter.one_hot.sum(1, keepdim=True)
                adapter.B[i].copy_(masked.view_as(mine))


def gathered(trainer, of=lambda p: p.detach()) -> Tensors:
    """A and B of all layers under their keys, whole, on every rank. of: what is read of a parameter."""
    import torch
    import torch.distributed as dist

    from megatron_ext.lora.attach import adapters_of

    mine = []
    for adapter in adapters_of(trainer.policy.chunks):
        for name, entry in adapter.sharded_state_dict().items():
            values = of(getattr(adapter, name)).float().numpy().copy()
            mine.append((entry.key, entry.global_shape, entry.global_offset, values))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    out: Tensors = {}
    for key, shape, offset, values in (each for part in everyone for each in part):
        whole = out.setdefault(key, np.full(shape, np.nan, np.float32))
        place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        already = whole[place]
        assert np.isnan(already).all() or np.array_equal(already, values), f"copies of {key} differ"
        whole[place] = values
    assert not any(np.isnan(whole).any() for whole in out.values())
    assert torch.is_grad_enabled()
    return out


def reduced(network) -> None:
    """Gradients of the last step whole on every data-parallel rank; `keep_gradients` has left them there."""
    import torch.distributed as dist

    for model in network.models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets if group.size() > 1 else ():
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


@dataclass(frozen=True)
class Learned:
    """logprobs: before. loss, gradients: of one step. sent: before it. adapters: before it. after: one Adam step."""

    logprobs: np.ndarray
    loss: float
    norm: float
    gradients: Tensors
    sent: Tensors
    adapters: Tensors
    after: np.ndarray


def _learn(config: ParallelConfig, model: str, lora: LoraConfig, trainer: TrainerConfig, samples, replay: bool):
    import torch.distributed as dist

    from megatron_ext.trainer import Trainer

    it = Trainer(model, config, trainer, OptimizerConfig(lr=1e-3, clip_grad=0.0), replay=replay, lora=lora)
    stir(it)
    it.restart_optimizer(OptimizerConfig(lr=1e-3, clip_grad=0.0))
    adapters = gathered(it)
    sent = {name: tensor.numpy().copy() for bucket in it.export() for name, tensor in bucket}
    before = it.logprobs(samples)
    step, kept = it.policy.optimizer.step, []

    def keep():
        reduced(it.policy)
        kept.append(gathered(it, lambda p: p.main_grad))
        return step()

    it.policy.optimizer.step = keep
    update = it.update(samples, weighted_likelihood)
    after = it.logprobs(samples)
    whole = (kept[0], sent, adapters) if dist.get_rank() == 0 else ({}, {}, {})
    return before, update, after, *whole


def learn(
    layout: ParallelConfig, model: str, lora: LoraConfig, trainer: TrainerConfig, samples, *, replay: bool = False
) -> Learned:
    """A step of adapters that have products other than 0, on all ranks of a layout."""
    parts = run_ranks(_learn, layout, str(model), lora, trainer, samples, replay)
    before, _ = joined([p[0] for p in parts], len(samples))
    after, _ = joined([p[2] for p in parts], len(samples))
    update = merge_update([p[1] for p in parts])
    gradients, sent, adapters = parts[0][3:]
    loss, norm = update["loss/objective"], update["train/grad_norm"]
    return Learned(before, loss, norm, gradients, sent, adapters, after)
