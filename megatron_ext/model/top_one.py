"""A router that chooses one expert and normalises its weight, with sigmoid scores (2412.19437, equation 13 for K = 1).

Megatron-Core 0.19.2 normalises only where more than one is chosen: a token's one expert would count with its score s in
place of s / s.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from megatron_ext.mcore import TopKRouter


def mlp_submodules(mlp: Any) -> Any:
    """The submodules of a layer spec's MLP or mixture of experts."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


class TopOneRouter(TopKRouter):
    """Its one weight a token is normalised; the choice, the bias, the factor and replay are Megatron-Core's."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[tokens, 1, experts] -> weights [tokens, experts], 0 but for the chosen expert, and which it is."""
        weights, chosen = super().routing(logits, padding_mask)
        factor = self.config.moe_router_topk_scaling_factor or 1.0
        return weights / (weights.sum(-1, keepdim=True) / factor + 1e-20), chosen
