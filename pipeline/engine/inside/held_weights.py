"""What an SGLang server holds of each Hugging Face tensor, as checksums: its loader, run backwards.

SGLang (0.5.23) joins tensors as it loads them, cuts them over its ranks, ignores a name that it does not know, and can
hand none back by name. But its loader says where everything goes: `model.load_weights` copies pieces of a tensor into
pieces of parameters. Given probes in place of tensors, each such copy is turned round: the probe takes what the
parameter holds. A probe that no copy reached was ignored.

A loader that computes anything other than views, `torch.cat` and casts of a tensor cannot be run backwards; that is an
error, and leaves the parameters as they are. `hooks.py` calls this in the server's schedulers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from pipeline.engine.checksum import checksum

_BLOCKS = "use_flashinfer_trtllm_moe"  # of UnquantizedFusedMoEMethod: experts are held in blocks

Described = Iterable[tuple[str, str, list[int]]]


class CannotReadBackError(RuntimeError):
    """The loader does with a tensor what cannot be undone; the message names it."""


@contextlib.contextmanager
def canonical_experts(model: nn.Module) -> Iterator[None]:
    """Within, experts lie as they are loaded. Kernels of TensorRT-LLM hold them in blocks, and a loader that meets such
    a tensor brings it back in place for good; so all are brought back before, and put into blocks again behind."""
    layers = [m for m in model.modules() if getattr(getattr(m, "quant_method", None), _BLOCKS, False)]
    for layer in layers:
        layer.quant_method.restore_weights_before_loading(layer)  # pyright: ignore
    try:
        yield
    finally:
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)  # pyright: ignore


def held_checksums(model: nn.Module, described: Described) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Of each tensor, (elements that this rank holds, checksum of these); and the parameters that hold any.

    model: with SGLang's `load_weights`. described: (Hugging Face name, dtype such as "bfloat16", shape).
    Raises CannotReadBackError.
    """
    with canonical_experts(model):
        return _held(model, described)


def _held(model: nn.Module, described: Described) -> tuple[dict[str, tuple[int, int]], list[str]]:
    reading = _Reading(model)
    device = next(model.parameters()).device
    probes = {name: reading.add(torch.empty(s, dtype=getattr(torch, d), device=device)) for name, d, s in described}
    _Probe.reading = reading
    try:
        with torch.no_grad():
            load: Callable[..., object] = model.load_weights  # pyright: ignore[reportAssignmentType]
            load(iter([(name, reading.probe(tensor)) for name, tensor in probes.items()]))
            reading.undo()
    finally:
        _Probe.reading = None
    found = {}
    for name, tensor in probes.items():
        covered = reading.covered(tensor)
        found[name] = (int(covered.sum()), checksum(tensor, covered))
    return found, sorted(reading.reached)


class _Reading:
    """Tensors that are being filled, and which of their elements are."""

    def __init__(self, model: nn.Module):
        self.parameters: dict[int, list[str]] = {}  # by the address of their storage
        for name, parameter in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            self.parameters.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
        self.filled: dict[int, tuple[Tensor, Tensor]] = {}  # by the same: the tensor, and bool of its shape
        self.made_of: list[tuple[Tensor, list[Tensor], int]] = []  # a tensor, what it was made of, joined along
        self.reached: set[str] = set()

    def add(self, tensor: Tensor) -> Tensor:
        self.filled[tensor.untyped_storage().data_ptr()] = (tensor, torch.zeros_like(tensor, dtype=torch.bool))
        return tensor

    @staticmethod
    def probe(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(_Probe)

    def covered(self, view: Tensor) -> Tensor:
        """The same view of the marks of the tensor that it is a view of."""
        _, marks = self.filled[view.untyped_storage().data_ptr()]
        return marks.as_strided(view.shape, view.stride(), view.storage_offset())

    def knows(self, view: Tensor) -> bool:
        return view.untyped_storage().data_ptr() in self.filled

    def take(self, parameter: Tensor, view: Tensor) -> None:
        """The copy view -> parameter, turned round."""
        names = self.parameters.get(parameter.untyped_storage().data_ptr())
        if names is None or parameter.shape != view.shape:
            raise CannotReadBackError(f"{list(view.shape)} copied to what is no parameter of this shape")
        view.copy_(parameter)
        self.covered(view).fill_(True)
        self.reached.update(names)

    def derive(self, tensor: Tensor, sources: list[Tensor], axis: int) -> None:
        """tensor is a joined copy of sources."""
        self.made_of.append((self.add(tensor), sources, axis))

    def undo(self) -> None:
        """Give what copies were filled with to what they are copies of, newest first."""
        for tensor, sources, axis in reversed(self.made_of):
            parts = tensor.split([s.shape[axis] for s in sources], axis) if tensor.dim() else [tensor]
            for part, source in zip(parts, sources, strict=True):
                marks = self.covered(part)
                source.copy_(torch.where(marks, part.to(source.dtype), source))
                self.covered(source).logical_or_(marks)


_READS_NUMBERS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}
_COPIES = {"contiguous", "clone", "to", "float", "bfloat16", "half", "cpu", "cuda"}


class _Probe(Tensor):
    """A view of a tensor that is being filled: what the loader is given."""

    reading: _Reading | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        reading, name = cls.reading, getattr(func, "__name__", str(func))
        assert reading is not None
        if func is Tensor.copy_ and isinstance(args[1], cls):
            reading.take(args[0], args[1].as_subclass(Tensor))
            return args[0]
        if func is Tensor.__setitem__ and isinstance(args[2], cls):
            reading.take(args[0][args[1]], args[2].as_subclass(Tensor))
            return None
        if name in _READS_NUMBERS:
            raise CannotReadBackError(f"the loader reads numbers of a tensor ({name})")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        return cls._followed(reading, func, name, args, kwargs or {}, out)

    @classmethod
    def _followed(cls, reading: _Reading, func, name: str, args, kwargs, out):
        """The result as probes where it is made of tensors that can be followed back."""
        if isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
            return type(out)(cls._followed(reading, func, name, args, kwargs, o) for o in out)
        if not isinstance(out, Tensor):
            return out  # a shape, a device, ...
        plain = out.as_subclass(Tensor)
        if not reading.knows(plain):
            if func is torch.cat:
                sources = [s.as_subclass(Tensor) for s in args[0]]
                reading.derive(plain, sources, kwargs.get("dim", args[1] if len(args) > 1 else 0))
            elif name in _COPIES:
                reading.derive(plain, [args[0].as_subclass(Tensor)], 0)
            else:
                raise CannotReadBackError(f"the loader computes with a tensor ({name})")
        return reading.probe(plain)
