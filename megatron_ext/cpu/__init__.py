"""Run Megatron-Core 0.19.2 on a machine without CUDA, over gloo.

Everything that differs from the GPU stands in this package, in memory, each patch with its reason:

- `cuda.py`:     the names of `torch.cuda` that Megatron-Core calls while it builds and runs a model.
- `patches.py`:  functions inside Megatron-Core.
- `adam.py`:     an Adam laid out like Transformer Engine's FusedAdam.
- `rope.py`:     the rotary embedding of packed sequences, without a loop over them.
- `layers.py`:   linear layers and norms with the parameter names of Transformer Engine's.
- `experts.py`:  grouped expert linears, likewise.

`install` is called by `megatron_ext.mcore` before Megatron-Core is imported and does nothing where CUDA is present.
"""

from __future__ import annotations

import sys

import torch

# Megatron-Core imports these kernels for GPUs where they are installed, and does without where they are not: 2.5 s.
_GPU_ONLY = ("flashinfer", "flash_attn")

_installed = False


def needed() -> bool:
    """Whether this machine has no CUDA device, so that Megatron-Core needs the stand-ins."""
    return not torch.cuda.is_available()


def install() -> None:
    """Put the stand-ins in place, once per process. Nothing happens where CUDA is present."""
    global _installed
    if _installed or not needed():
        return
    _installed = True
    for package in _GPU_ONLY:
        sys.modules.setdefault(package, None)  # pyright: ignore[reportArgumentType]
    from megatron_ext.cpu import cuda

    cuda.install()
    from megatron_ext.cpu import patches

    patches.install()
