"""Hugging Face tensors that pack all experts of a layer, put together as the experts come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_ext.hf.tables import Match


class PackedExperts:
    """Holds what has come of tensors that are not whole yet: no more of a layer than what its experts are."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.held: dict[str, Tensor] = {}
        self.missing: dict[str, set[int]] = {}

    def add(self, match: Match, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What a parameter became -> (name, tensor) of every Hugging Face tensor that is whole with it."""
        for name, tensor in zip(match.hf_names, tensors, strict=True):
            if match.part is None:
                yield name, tensor
                continue
            if name not in self.held:
                self.held[name] = tensor.new_empty((self.num_experts, *tensor.shape))
                self.missing[name] = set(range(self.num_experts))
            self.held[name][match.part].copy_(tensor)
            self.missing[name].remove(match.part)
            if not self.missing[name]:
                del self.missing[name]
                yield name, self.held.pop(name)
