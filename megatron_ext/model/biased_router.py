"""A router whose logits have a bias (gpt-oss), in float32 beside bfloat16 weights.

Megatron-Core 0.19.2 hands the bias to Transformer Engine's matrix product, and cuBLASLt reads a bias in the dtype of
the result: a bfloat16 one would be read as float32, past its end. Here it is added to the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.mcore import TopKRouter, router_gating_linear


class BiasedRouter(TopKRouter):
    """The choice, its weights and replay are Megatron-Core's."""

    def gating(self, input: Tensor) -> Tensor:
        """[tokens, rows, hidden] -> logits [tokens, rows, experts], in float32 or in the dtype of the input."""
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else input.dtype
        return router_gating_linear(input, self.weight, None, dtype) + self.bias.to(dtype)
