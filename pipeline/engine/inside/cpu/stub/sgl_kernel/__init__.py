"""Takes the place of `sgl_kernel` where there is no CUDA: every name imports, calling one raises.

The real package (sglang-kernel 0.4.10) loads libcuda when it is imported. SGLang 0.5.23 imports it without
asking for the device, and on a CPU without AMX calls none of its kernels on the path of a mixture-of-experts
decoder except the hash below. The folder above stands on PYTHONPATH only for a server that runs on the CPU.
"""

from __future__ import annotations

import torch

__version__ = "0.4.10"
__path__: list[str] = []  # a package, so that `from sgl_kernel.scalar_type import x` fails with ImportError


class _MissingKernel:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{self.name} needs a GPU")


def __getattr__(name: str) -> _MissingKernel:
    if name.startswith("__"):
        raise AttributeError(name)
    return _MissingKernel(name)


_MASK32 = 0xFFFFFFFF


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK32


def _absorb(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _rotate_left((word * 0xCC9E2D51) & _MASK32, 15) * 0x1B873593 & _MASK32
    return (_rotate_left(state ^ word, 13) * 5 + 0xE6546B64) & _MASK32


def _murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits, state 0) of the 16 bytes (seed, position, column): the noise of a seeded sample.

    seed: [rows] 64 bits. positions: [rows]. cols: [columns]. Returns [rows, columns] uint32.
    """
    seed64 = seed.view(torch.int64)[:, None]
    state = _absorb(torch.zeros_like(seed64), seed64 & _MASK32)
    state = _absorb(state, (seed64 >> 32) & _MASK32)
    state = _absorb(state, positions.to(torch.int64)[:, None] & _MASK32)
    state = _absorb(state, cols.to(torch.int64)[None, :] & _MASK32) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK32
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK32
    return (state ^ (state >> 16)).to(torch.uint32)


# Without this operator SGLang ignores `sampling_seed` on the CPU.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor cols) -> Tensor")
_library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")
