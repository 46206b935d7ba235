"""The names of `torch.cuda` that Megatron-Core 0.19.2 calls unconditionally, answered for a CPU.

Megatron-Core asks for the current CUDA device, makes streams and events and seeds CUDA generators on paths that have
nothing to do with a GPU. On a CPU there is one queue, so a stream is nothing, an event has always happened, and the
CUDA generator is the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
import sys

import torch
import torch.utils._device

_CPU = torch.device("cpu")


class _Stream:
    """A stream or an event of a machine that has one queue."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = wait = record = synchronize = _nothing

    def record_event(self, *args, **kwargs):
        return self

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


def _is_cuda(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory):
    """A tensor factory that reads `device="cuda"` as the CPU and drops `pin_memory`, which needs a driver."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def install() -> None:
    """Replace the names. Each gets a function of its own: torch._dynamo's rule table refuses one object twice."""
    # sgl-flash-mla, installed beside SGLang, raises OSError on import without libcuda; None reads as "not installed".
    sys.modules.setdefault("flash_mla", None)

    cuda, stream, generator = torch.cuda, _Stream(), torch.random.default_generator
    cuda.current_device = lambda: _CPU  # used as device=torch.cuda.current_device()
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *a, **k: stream
    cuda.default_stream = lambda *a, **k: stream
    cuda.stream = lambda *a, **k: contextlib.nullcontext()
    cuda.synchronize = lambda *a, **k: None
    cuda.empty_cache = lambda *a, **k: None
    cuda.set_device = lambda *a, **k: None
    cuda.manual_seed = lambda seed: generator.manual_seed(int(seed)) and None
    cuda.manual_seed_all = lambda seed: generator.manual_seed(int(seed)) and None
    cuda.get_rng_state = lambda *a, **k: generator.get_state()
    cuda.set_rng_state = lambda state, *a, **k: generator.set_state(state) and None

    # `with torch.device(...)` redirects the constructors that it lists on its first use: list the real ones.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *a, **k: self

    # Megatron's optimizers compare tensor.type() with 'torch.cuda.FloatTensor' and reject everything else.
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_as_cuda(self, *args, **kwargs):
        result = tensor_type(self, *args, **kwargs)
        asked_by_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.")
        if not args and not kwargs and asked_by_megatron:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_as_cuda
