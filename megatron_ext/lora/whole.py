"""The adapters of all ranks, whole, on the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.lora.attach import adapters_of
from megatron_ext.mcore import GPTModel, is_main_replica


@torch.no_grad()
def whole_adapters(chunks: Sequence[GPTModel]) -> dict[str, Tensor]:
    """ "decoder.layers.3.self_attention.linear_qkv.A" -> tensor in host memory; empty on other ranks. All ranks call it
    together."""
    mine = []
    for adapter in adapters_of(chunks):
        for entry in adapter.sharded_state_dict().values():
            if is_main_replica(entry.replica_id):
                mine.append((entry.key, entry.global_shape, entry.global_offset, entry.data.detach().cpu()))
    first = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine, everyone, dst=0)
    whole: dict[str, Tensor] = {}
    for key, shape, offset, part in (each for parts in everyone or [] for each in parts):
        key = key.removeprefix("adapters.")
        if key not in whole:
            whole[key] = torch.empty(shape, dtype=part.dtype)
        whole[key][tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return whole
