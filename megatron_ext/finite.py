"""Where the first number that is not finite comes from: a forward pass, module by module.

Hooks look at what every module is given and what it answers, in the order in which modules end, the innermost first.
The first one whose inputs are finite and whose output is not made it. Of a rank whose input was not finite already,
another rank made it. Of grouped experts the rows of the output tell which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ext.hf.params import ADAPTERS, local_parameters
from megatron_ext.lora.attach import adapters_of
from megatron_ext.lora.targets import layer_name
from megatron_ext.mcore import parallel_state
from megatron_ext.parts import NotFinite

if TYPE_CHECKING:
    from megatron_ext.batch.layout import Sample
    from megatron_ext.network import Network, Routing

_BEHIND_LAYERS = 1_000_000
_LAYER = re.compile(r"(?<=\blayers\.)\d+")


@dataclass
class _Watch:
    """What the hooks of a pass have found. calls: of modules that ended."""

    first_expert: int
    calls: int = 0
    found: NotFinite | None = None

    def hook(self, name: str, layer: int | None, module: Any, given: tuple, named: dict, answer: Any) -> None:
        self.calls += 1
        if self.found is not None:
            return
        bad = [t for t in _tensors(answer) if not _finite(t)]
        if not bad or not all(map(_finite, _tensors([given, named]))):
            return
        expert = None
        if ".experts.linear_fc" in name and len(given) > 1:
            expert = self.first_expert + _expert_of_row(bad[0], given[1])
        wrong = sum(int((~torch.isfinite(t)).sum()) for t in bad)
        depth = layer if layer is not None else (-1 if name.startswith("embedding") else _BEHIND_LAYERS)
        self.found = NotFinite("output", name, layer, expert, wrong, sum(t.numel() for t in bad), depth, self.calls)


def parameters_not_finite(network: Network) -> list[NotFinite]:
    """Of this rank, by their names in the whole model."""
    found = []
    named = [(name, tensor) for name, tensor, _ in local_parameters(network.chunks, network.model)]
    for adapter in adapters_of(network.chunks):
        layer = layer_name(adapter.matches[0])
        named += [(f"{layer} (adapter) {kind}", parameter) for kind, parameter in adapter.named_parameters()]
    for name, tensor in named:
        if not _finite(tensor):
            layer = _LAYER.search(name)
            expert = re.search(r"\.experts\.linear_fc\d\.(?:weight|bias)(\d+)$", name)
            wrong = int((~torch.isfinite(tensor)).sum())
            where = None if layer is None else int(layer[0])
            found.append(
                NotFinite("weight", name, where, None if expert is None else int(expert[1]), wrong, tensor.numel())
            )
    return found


def first_output_not_finite(network: Network, samples: Sequence[Sample], routing: Routing) -> NotFinite | None:
    """Of this rank, in a forward pass of these samples; None where all that it makes is finite. All ranks together."""
    here = network.model.num_experts // parallel_state.get_expert_model_parallel_world_size()
    watch = _Watch(here * parallel_state.get_expert_model_parallel_rank())
    handles = []
    for chunk in network.chunks:
        layers = {f"decoder.layers.{i}": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, module in chunk.named_modules():
            if name.startswith(ADAPTERS):  # what they make is part of their layer's output
                continue
            local = ".".join(name.split(".")[:3])
            layer = layers.get(local)
            shown = name if layer is None else name.replace(local, f"decoder.layers.{layer}", 1)
            handles.append(module.register_forward_hook(partial(watch.hook, shown or "model", layer), with_kwargs=True))
    try:
        network.forward(samples, lambda batch, quantities: (quantities[0].new_zeros(()), {}), routing)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an answer, however they are packed."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _of(value.values())
    elif isinstance(value, list | tuple):
        yield from _of(value)


def _of(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from _tensors(value)


def _expert_of_row(output: Tensor, tokens_per_expert: Any) -> int:
    """Local number of the expert whose rows the first number that is not finite is in."""
    row = int((~torch.isfinite(output)).flatten(1).any(1).nonzero()[0])
    for expert, tokens in enumerate(int(n) for n in tokens_per_expert):
        if row < tokens:
            return expert
        row -= tokens
    raise ValueError(f"the output has {len(output)} rows, more than tokens")
