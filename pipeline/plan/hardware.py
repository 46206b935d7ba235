"""GPUs, and what share of their peaks is reached. Every other figure of a plan follows from a formula.

Peaks are NVIDIA's data sheets: dense bf16 without sparsity, memory bandwidth, PCIe one way. `memory` is what the driver
leaves of a card's; `network` one adapter a GPU (200 Gb/s in a DGX A100, 400 in H100, H200 and B200, 800 in B300);
`nvlink` one way; `host` the main memory of such a machine, by GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.run import GPUName

GIB = 2.0**30


@dataclass(frozen=True)
class GPU:
    """memory, host: bytes. bf16: FLOP/s. bandwidth, pcie, nvlink, network: bytes/s."""

    name: GPUName
    memory: float
    bf16: float
    bandwidth: float
    pcie: float
    nvlink: float
    network: float
    host: float


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 79.2 * GIB, 312e12, 2.039e12, 32e9, 300e9, 25e9, 256e9),
        GPU("h100", 79.1 * GIB, 989e12, 3.35e12, 64e9, 450e9, 50e9, 256e9),
        GPU("h200", 139.8 * GIB, 989e12, 4.8e12, 64e9, 450e9, 50e9, 256e9),
        GPU("b200", 178.3 * GIB, 2250e12, 7.7e12, 64e9, 900e9, 50e9, 256e9),
        GPU("b300", 268.5 * GIB, 2250e12, 7.7e12, 64e9, 900e9, 100e9, 256e9),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of a peak that are assumed, and other constants of a plan that no formula gives.

    train:       of bf16 FLOP/s in the trainer's passes, pipeline bubble aside. Published for mixtures of experts in
                 bf16 on H100: 0.15 (GPT-OSS 120B) to 0.28 (Qwen3-235B-A22B, DeepEP and overlap); docs/plan.md has the
                 list. Short packed sequences and routing that nobody balances lie at its lower end.
    decode:      of memory bandwidth while sampling. With 0.45 the steps that NeMo-RL publishes are met within 25%
                 (docs/plan.md); it is what one server family reached, not a measurement of SGLang.
    prefill:     of FLOP/s while prompts are read.
    network:     of one adapter's bandwidth, or NVLink's, while weights are sent, or a server's machines add up.
    host_adam:   bytes/s that Adam on the CPU moves for one rank, where the optimizer is offloaded.
    launch_s:    a layer of a decoding step that is too small to fill a GPU: its kernels and two all-reduces.
    hop_s:       an all-reduce between machines, however little it carries.
    skew:        tokens of the busiest expert-parallel rank, by the mean.
    reserve:     bytes of a GPU that tensors cannot have: CUDA context, NCCL's buffers, cuBLAS workspaces.
    asleep:      bytes of a GPU that an engine keeps whose turn it is not: CUDA context, communicators.
    fragments:   of what tensors take, lost between them in PyTorch's allocator.
    static:      of a GPU's memory for the weights and KV cache of SGLang, where mem_fraction_static is not given.
    """

    train: float = 0.20
    decode: float = 0.45
    prefill: float = 0.30
    network: float = 0.50
    host_adam: float = 40e9
    launch_s: float = 40e-6
    hop_s: float = 30e-6
    skew: float = 1.25
    reserve: float = 4 * GIB
    asleep: float = 3 * GIB
    fragments: float = 0.05
    static: float = 0.85


EFFICIENCY = Efficiency()
