"""What SGLang 0.5.23 needs in each of its processes to run without a GPU. Its plugin loader calls `activate`.

The entry point stands in pyproject.toml, so SGLang calls this wherever the project is installed: it does nothing in a
server that `server.py` did not start. In one for GPUs it registers `hooks.py`, and hands the call on to
`router.py` and `scaled_logits.py`, which act on any device where they are switched on.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

from pipeline.engine.inside import router, scaled_logits
from pipeline.engine.processes import TOKEN_VARIABLE
from pipeline.engine.server import CPU_ATTENTION_BACKEND


def activate() -> None:
    """Register the hooks of every server; on the CPU, the batched attention backend, and make SGLang start."""
    router.activate()
    scaled_logits.activate()
    if TOKEN_VARIABLE in os.environ:
        from pipeline.engine.inside import hooks

        hooks.install()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    # It comes with SGLang, serves GPUs only, and takes 2 s to import.
    sys.modules["flashinfer"] = None  # pyright: ignore[reportArgumentType]

    from sglang.srt.arg_groups import model_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices, add_deterministic_attention_backend_choices

    from pipeline.engine.inside.cpu import given_memory

    given_memory.install()
    add_attention_backend_choices([CPU_ATTENTION_BACKEND])
    add_deterministic_attention_backend_choices([CPU_ATTENTION_BACKEND, "torch_native"])
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _after_configuration, HookType.AFTER)
    # Of an attention backend that it does not know, its rules for models say that it has neither sinks nor windows.
    # Here alone: a hook of the registry would reach all that read the backend.
    model_hook.attention_backends_of = _as_triton(model_hook.attention_backends_of)


def _as_triton(original: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], tuple[Any, ...]]:
    """Attention backends as SGLang's rules for models see them: ours has what Triton's has."""
    return lambda arguments: tuple("triton" if name == CPU_ATTENTION_BACKEND else name for name in original(arguments))


def _after_configuration(result: Any, *args: Any, **kwargs: Any) -> None:
    """Runs in the server's first process when it has imported everything and started nothing."""
    # SGLang asks for "spawn", after which each process imports everything again, 15 s each. It must where CUDA has
    # been initialised; here it need not.
    multiprocessing.set_start_method("fork", force=True)

    from sglang.srt import batch_invariant_ops
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.pool_host import common

    from pipeline.engine.inside.cpu import batch_invariance, parted

    register_attention_backend(CPU_ATTENTION_BACKEND)(_create_attention_backend)
    parted.install()
    # The table of routes is page-locked for the GPU by cudaHostRegister; there is none.
    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate  # pyright: ignore[reportArgumentType]
    # Deterministic inference replaces matrix products by Triton kernels, which need a GPU.
    batch_invariant_ops.enable_batch_invariant_mode = batch_invariance.install


def _allocate(dims: tuple[int, ...], *, dtype: Any, device: str, pin_memory: bool, allocator: Any, **_: Any) -> Any:
    import torch

    return torch.empty(dims, dtype=dtype, device="cpu")


def _create_attention_backend(runner: Any) -> Any:
    from pipeline.engine.inside.cpu import patches
    from pipeline.engine.inside.cpu.batched_attention import BatchedAttentionBackend

    patches.install(same_bits=runner.server_args.enable_deterministic_inference)
    return BatchedAttentionBackend(runner)
