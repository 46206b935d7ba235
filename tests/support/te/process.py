"""The trainer as it is on a GPU with Transformer Engine, as far as a CPU goes: every family built, and trained for a
step with Transformer Engine's kernels in torch.

    python -m tests.support.te.process JOBS OUT

JOBS: a pickle of [(name, model directory, samples)]. OUT: one of what `answer` says of each, and of planted faults.
Run by itself: what Megatron-Core is depends on whether Transformer Engine can be imported.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def as_on_a_gpu() -> None:
    """Torch says that there is an H100, and Megatron-Core finds Transformer Engine; tensors stay on the CPU."""
    import torch
    import torch.distributed as dist

    from tests.support.te import stand_in, torch_kernels

    torch.compile = lambda f=None, **kw: f if f is not None else (lambda g: g)  # pyright: ignore[reportAttributeAccessIssue]
    stand_in.install()
    torch_kernels.install()
    from megatron_ext import cpu
    from megatron_ext.cpu import cuda

    cpu.needed = lambda: False
    cuda.install()
    h100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30)
    torch.cuda.get_device_capability = lambda *a, **k: (9, 0)
    torch.cuda.get_device_properties = lambda *a, **k: h100  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    import megatron_ext.mcore

    torch_kernels.install_megatrons()
    from megatron_ext.cpu import patches

    # Of the patches those that stand for a driver or a backend; none for a layer.
    patches._random_state()
    patches._uneven_collectives()
    patches._split_sizes_as_lists()
    torch.cuda.is_available = lambda: True
    join = dist.init_process_group

    def with_gloo(backend, **kwargs):
        assert backend == "cpu:gloo,cuda:nccl"
        return join("gloo", **kwargs)

    dist.init_process_group = with_gloo
    import megatron_ext.network

    megatron_ext.network.cpu = SimpleNamespace(needed=lambda: True)  # pyright: ignore[reportAttributeAccessIssue]


def built(model: str, samples: list, *, offload: bool) -> dict[str, Any]:
    """A bfloat16 policy as a preset has it: names and dtypes of its parameters, classes, optimizer, log-probs."""
    from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig, TrainerPrecision
    from megatron_ext.trainer import Trainer
    from tests.support.jobs import joined

    trainer = Trainer(
        model,
        ParallelConfig(),
        TrainerConfig(recompute="full", offload_optimizer=offload),
        OptimizerConfig(),
        replay=True,
        precision=TrainerPrecision(weights="bfloat16"),
    )
    network = trainer.policy
    parts = getattr(network.optimizer, "chained_optimizers", [network.optimizer])
    parameters = {name: (tuple(p.shape), str(p.dtype)) for name, p in network.chunks[0].named_parameters()}
    return {
        "parameters": parameters,
        "exported": sorted(name for bucket in trainer.export() for name, _ in bucket),
        "classes": sorted({type(m).__name__ for m in network.chunks[0].modules()}),
        "logprobs": joined([trainer.logprobs(samples, "native")], len(samples))[0],
        "optimizers": sorted({type(part.optimizer).__module__ + "." + type(part.optimizer).__name__ for part in parts}),
    }


def answer(name: str, model: str, samples: list) -> dict[str, Any]:
    """A step in float32, of adapters too where the family is one of ADAPTED, and what was built in bfloat16."""
    from tests.support.te.step import ADAPTED, adapted, step

    steps = {"step": step(model, samples)} | ({"adapted": adapted(model, samples)} if name in ADAPTED else {})
    return steps | {
        "offloaded" if offload else "held": built(model, samples, offload=offload) for offload in (False, True)
    }


def planted(model: str, samples: list) -> dict[str, Any]:
    """What happens to a model whose layers have a fault."""
    import transformer_engine.pytorch as te
    from megatron.core.transformer.identity_op import IdentityFuncOp

    from megatron_ext.model import build
    from tests.support.te.step import step

    make, spec = te.LayerNormLinear.__init__, build.layer_spec

    def renamed(self, in_features, out_features, epsilon=1e-5, **kwargs):
        make(self, in_features, out_features, eps=epsilon, **{k: v for k, v in kwargs.items() if k != "eps"})

    def strict(self, in_features, out_features, **kwargs):
        if "eps" in kwargs:
            raise TypeError("LayerNormLinear.__init__() got an unexpected keyword argument 'eps'")
        renamed(self, in_features, out_features, **kwargs)

    def without_residual(*args, **kwargs):
        made = spec(*args, **kwargs)
        made.layer_specs[0].submodules.self_attn_bda = IdentityFuncOp
        return made

    found: dict[str, Any] = {}
    te.LayerNormLinear.__init__ = strict
    try:
        step(model, samples)
    except TypeError as error:
        found["a renamed argument"] = str(error)
    te.LayerNormLinear.__init__ = make
    build.layer_spec = without_residual
    try:
        found["an addition left out"] = step(model, samples)
    except Exception as error:
        found["an addition left out"] = error
    build.layer_spec = spec
    return found


def main() -> None:
    """The command."""
    as_on_a_gpu()
    import torch

    from megatron_ext import parallel
    from megatron_ext.config import ParallelConfig

    torch.set_num_threads(1)
    jobs = pickle.loads(Path(sys.argv[1]).read_bytes())
    with tempfile.TemporaryDirectory() as meeting:
        parallel.initialize(ParallelConfig(), rank=0, init_method=f"file://{meeting}/ranks")
        answers = {name: answer(name, model, samples) for name, model, samples in jobs}
        answers["planted"] = planted(*jobs[0][1:])
        parallel.shutdown()
    Path(sys.argv[2]).write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    main()
