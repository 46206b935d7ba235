"""The trainer's weights as a quantised rollout engine computes with them.

Every matrix but embeddings, LM head and router is rounded to int8 or float8_e4m3, one scale an output channel, and
back to its dtype before it is sent. The engine then differs from the trainer as one with such weights does. Nothing
gets smaller or faster by it: SGLang's own quantised kernels are not driven.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_ext.hf.bucket import Bucket
from pipeline.config.precision import RolloutWeights

_LARGEST = {"int8": 127.0, "fp8": 448.0}


def rounded(buckets: Iterable[Bucket], kind: RolloutWeights, kept: tuple[str, ...]) -> Iterator[Bucket]:
    """The same buckets under the same names, rounded. kind "same" hands them on.

    kept: endings of the names of tensors that stay as they are (Family.kept_whole).
    """
    for bucket in buckets:
        yield (
            bucket
            if kind == "same"
            else [(name, tensor if name.endswith(kept) else _round(tensor, kind)) for name, tensor in bucket]
        )


def _round(tensor: Tensor, kind: RolloutWeights) -> Tensor:
    """[out, in], or [experts, in, out] of gpt-oss -> the same shape and dtype."""
    if tensor.dim() < 2:
        return tensor
    largest = tensor.float().abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST[kind], 1.0)
    steps = tensor.float() / scale
    held = steps.round() if kind == "int8" else steps.to(torch.float8_e4m3fn).float()
    return (held * scale).to(tensor.dtype)
