"""Keys and values rounded as the rollout engine's cache rounds them.

The engine attends to what its KV cache holds. Where that is narrower than the activations, the trainer rounds its keys
(rotated, as they are cached) and values alike, and both engines compute one function. With an fp8 cache the engine's
kernel multiplies fp8 by fp8, so the query is rounded too; and it rounds the weights of the softmax, which stay as they
are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class _Rounded(torch.autograd.Function):
    """x in a narrower dtype and back, without a scale. The gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def round_key_values(chunks: Iterable[torch.nn.Module], kv_cache: str) -> None:
    """Make the core attention of every layer read keys and values of this precision; "same" changes nothing.

    Raises ValueError for latent attention, whose cache holds no keys and values.
    """
    if kv_cache == "same":
        return
    dtype = _DTYPES[kv_cache]

    def before_attention(module: torch.nn.Module, inputs: tuple[Any, ...]):
        query, key, value, *others = inputs
        if kv_cache.startswith("fp8"):
            query = _Rounded.apply(query, dtype)
        return query, _Rounded.apply(key, dtype), _Rounded.apply(value, dtype), *others

    for chunk in chunks:
        if getattr(chunk.config, "multi_latent_attention", False):
            raise ValueError("the cache of latent attention holds latents, not keys; set precision.kv_cache=same")
        for name, module in chunk.named_modules():
            if name.endswith("self_attention.core_attention"):
                module.register_forward_pre_hook(before_attention)
