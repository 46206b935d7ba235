"""Linear layers and norms without Transformer Engine, under Transformer Engine's parameter names.

Its spec fuses a layer's norm into the linear that follows, so the norm's weight is called
`linear_qkv.layer_norm_weight`. With the same names here, one weight map and one checkpoint format serve both.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from megatron_ext.cpu.row_functions import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor. Megatron's own torch wrapper refuses sequence parallelism; this
    one marks its weight, so that its gradient is summed over the tensor-parallel ranks."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered and config.perform_initialization:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x):
        return rms_norm(x, factor(self.weight, self.zero_centered), self.eps)


def factor(weight, zero_centered):
    """What a norm multiplies by: its weight, or 1 + weight in float32, rounded."""
    return (1.0 + weight.float()).to(weight.dtype) if zero_centered else weight


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear: `weight` and `layer_norm_weight`."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(start(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_, *args, **kwargs):
        weight = factor(self.layer_norm_weight, self.zero_centered)
        return super().forward(rms_norm(input_, weight, self.eps), *args, **kwargs)


class DuplicatedLinear(torch.nn.Linear):
    """A linear layer that every tensor-parallel rank holds whole: Transformer Engine's parallel_mode="duplicated"."""

    def __init__(self, input_size, output_size, *, parallel_mode, config, init_method, bias, **_):
        if parallel_mode != "duplicated" or bias:
            raise ValueError("a duplicated linear layer has parallel_mode='duplicated' and no bias")
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # each rank sees its tokens only: sum the gradients

    def forward(self, input):
        return super().forward(input), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group_if_none(None),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
