"""Run Megatron-Core 0.19.2 on a machine without CUDA, over gloo, and without Transformer Engine.

Everything that differs from the GPU stands in this package, in memory, each patch with its reason:

- `cuda.py`:     the names of `torch.cuda` that Megatron-Core calls while it builds and runs a model.
- `patches.py`:  functions inside Megatron-Core.
- `adam.py`:     an Adam laid out like Transformer Engine's FusedAdam.
- `rope.py`:     the rotary embedding of packed sequences, without a loop over them.
- `row_functions.py`: norms and gated activations in one pass each, by the loops of `row_loops.py`.
- `layers.py`:   linear layers and norms with the parameter names of Transformer Engine's.
- `freed_memory.py`: what becomes of memory that is freed.

`install` is called by `megatron_ext.mcore` before Megatron-Core is imported. Where there is a GPU and no Transformer
Engine it installs `adam.py`, `rope.py` and `layers.py` only; where there are both, nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

import torch

# Megatron-Core imports these kernels for GPUs where they are installed, and does without where they are not: 2.5 s.
_GPU_ONLY = ("flashinfer", "flash_attn")

_installed = False


def needed() -> bool:
    """Whether this machine has no CUDA device, so that Megatron-Core needs the stand-ins."""
    return not torch.cuda.is_available()


def torch_layers() -> bool:
    """Whether the model's layers are plain torch: where there is no GPU, or no Transformer Engine for it."""
    return needed() or importlib.util.find_spec("transformer_engine") is None


def install() -> None:
    """Put the stand-ins in place, once per process."""
    global _installed
    if _installed or not torch_layers():
        return
    _installed = True
    from megatron_ext.cpu import cuda, patches

    if not needed():
        logging.getLogger(__name__).warning(
            "Transformer Engine is not installed: the layers are plain torch, which is right but many times slower and "
            "larger than its kernels (docs/install.md)"
        )
        patches.install_layers()
        return
    for package in _GPU_ONLY:
        sys.modules.setdefault(package, None)  # pyright: ignore[reportArgumentType]
    cuda.install()
    patches.install()
