"""Adapters on the linear layers of a model chunk, everything else frozen.

They are in one module beside the chunk's own, `adapters`, so that no other module's checkpoint knows of them, and come
into a layer's output by a hook on its forward: a layer is the CPU's or Transformer Engine's, and need not know either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.config import LoraConfig
from megatron_ext.hf.description import ModelDescription
from megatron_ext.hf.params import ADAPTERS, local_parameters
from megatron_ext.hf.tables import Match
from megatron_ext.lora.adapter import Adapter, Adapters
from megatron_ext.lora.targets import choose_targets, layer_name
from megatron_ext.mcore import GPTModel


def attach(
    chunks: Sequence[GPTModel], model: ModelDescription, lora: LoraConfig, *, seed: int, value_head: bool = False
) -> None:
    """Freeze the chunks and give them adapters, which begin with a product of 0. A value head is trained whole.

    seed: of the adapters' A. Raises LoraError.
    """
    parts = {target.row: target.parts for target in choose_targets(model, lora)}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            router = ".router." in name and lora.router == "trained"
            parameter.requires_grad_(router or (value_head and name.startswith("output_layer.")))
        adapters = Adapters()
        for module, weights in _layers(chunk, model, value_head):
            first = weights[0][1]
            if first.row in parts:
                matches = [match for _, match in weights]
                adapter = Adapter(matches, weights[0][0], parts[first.row], model, lora, chunk.config)
                adapter.reset(seed)
                adapters.add_module(layer_name(first).replace(".", "-"), adapter)
                module.register_forward_hook(partial(_add, adapter))
        setattr(chunk, ADAPTERS, adapters)
        if chunk.pre_process:
            # Backward reaches the adapters of layers that are recomputed only where their input has a gradient.
            chunk.embedding.register_forward_hook(_with_gradient)


def adapters_of(chunks: Sequence[GPTModel]) -> Iterator[Adapter]:
    """All of this rank, in the order of their layers."""
    for chunk in chunks:
        yield from getattr(chunk, ADAPTERS, torch.nn.Module()).children()  # pyright: ignore[reportReturnType]


def merging(chunks: Sequence[GPTModel], model: ModelDescription) -> Callable[[Tensor], Tensor]:
    """What reads a parameter of these chunks for others: as it is, or with its adapter's product added."""
    numbered = {
        id(weight): (adapter, i)
        for adapter, weights in _adapted(chunks, model)
        for i, (weight, _) in enumerate(weights)
    }

    def read(parameter: Tensor) -> Tensor:
        if (found := numbered.get(id(parameter))) is None:
            return parameter.detach()
        adapter, number = found
        return adapter.merged(number, parameter.detach())

    return read


def _adapted(
    chunks: Sequence[GPTModel], model: ModelDescription
) -> Iterator[tuple[Adapter, Sequence[tuple[Tensor, Match]]]]:
    for chunk in chunks:
        if not hasattr(chunk, ADAPTERS):
            continue
        named = dict(getattr(chunk, ADAPTERS).named_children())
        for _, weights in _layers(chunk, model, True):
            adapter = named.get(layer_name(weights[0][1]).replace(".", "-"))
            if adapter is not None:
                yield adapter, weights


def _layers(
    chunk: GPTModel, model: ModelDescription, value_head: bool
) -> Iterator[tuple[torch.nn.Module, Sequence[tuple[Tensor, Match]]]]:
    """(linear layer, its weights in order, each with its row) of every matrix of attention and MLPs."""
    matches = {id(p): match for _, p, match in local_parameters([chunk], model, value_head=value_head)}
    for module in chunk.modules():
        weights = [
            (p, matches[id(p)])
            for name, p in module.named_parameters(recurse=False)
            if name.startswith("weight") and id(p) in matches and matches[id(p)].row.quantised
        ]
        if weights:
            yield module, weights


def _add(adapter: Adapter, module: Any, given: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """A hook on a linear layer: (output, bias that is added later) with the adapter's product in the output."""
    x, *rest = given
    norm = getattr(module, "layer_norm_weight", None)
    if norm is not None:  # the layer's own norm, which it has fused
        factor = norm.detach()
        if adapter.config.layernorm_zero_centered_gamma:
            factor = (1.0 + factor.float()).to(factor.dtype)
        x = F.rms_norm(x, x.shape[-1:], factor, adapter.config.layernorm_epsilon)
    out, bias = output
    return out + adapter(x, *rest[:1]), bias


def _with_gradient(module: Any, given: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
