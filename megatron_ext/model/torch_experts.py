"""Grouped expert linears without Transformer Engine, so that Megatron-Core's own TEGroupedMLP runs on a CPU.

Parameters are called `weight0` .. `weight{n-1}` (and `bias0` ..) and saved under one key with an expert axis, as
Transformer Engine's grouped linears are: a checkpoint made here loads there, in any expert and tensor layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class _GroupedLinear(torch.nn.Module):
    partition_dim: int

    def __init__(self, num_gemms, input_size, output_size, *, config, init_method, bias=False, pg_collection, **_):
        super().__init__()
        self.num_gemms, self.groups, self.biased = num_gemms, pg_collection, bias
        tp = pg_collection.expt_tp.size()
        if self.partition_dim == 0:
            output_size //= tp
        else:
            input_size //= tp
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            init_method(weight)
            set_tensor_model_parallel_attributes(weight, tp > 1, self.partition_dim, 1)
            weight.allreduce = False  # gradients are reduced over expert-data parallel
            self.register_parameter(f"weight{i}", weight)
        for i in range(num_gemms if bias else 0):
            vector = torch.nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(vector, tp > 1 and self.partition_dim == 0, 0, 1)
            vector.allreduce = False
            self.register_parameter(f"bias{i}", vector)

    def _multiply(self, x, tokens_per_expert, biases):
        parts = x.split([int(n) for n in tokens_per_expert])
        weights = (getattr(self, f"weight{i}") for i in range(self.num_gemms))
        return torch.cat([F.linear(*each) for each in zip(parts, weights, biases, strict=True)])

    @property
    def biases(self):
        """[output] each, or None each."""
        return [getattr(self, f"bias{i}", None) for i in range(self.num_gemms)]

    def backward_dw(self):
        """The weight gradient is computed in backward itself."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        out, ep = {}, self.groups.ep
        for i in range(self.num_gemms):
            axis = (len(sharded_offsets), ep.rank() * self.num_gemms + i, ep.size() * self.num_gemms)
            kinds = ("weight", "bias") if self.biased else ("weight",)
            parts = make_sharded_tensors_for_checkpoint(
                {kind: getattr(self, f"{kind}{i}") for kind in kinds},
                "",
                {"weight": 0, "bias": 0} if self.partition_dim == 0 else {"weight": 1},
                (*sharded_offsets, axis),
                tp_group=self.groups.expt_tp,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
            for kind, sharded in parts.items():
                sharded.key = prefix + kind
                sharded.replica_id = (*sharded.replica_id[:2], self.groups.expt_dp.rank())
                out[f"{prefix}{kind}{i}"] = sharded
        return out


class ColumnParallelGroupedLinear(_GroupedLinear):
    partition_dim = 0

    def forward(self, x, tokens_per_expert):
        """x: [tokens sorted by expert, input]; tokens_per_expert: [num_gemms]. Returns ([tokens, output], no bias)."""
        return self._multiply(x, tokens_per_expert, self.biases), None


class _OnFirstRank(torch.autograd.Function):
    """A bias on the first of the ranks whose outputs are summed, 0 on the others; its gradient is whole on all."""

    @staticmethod
    def forward(ctx, bias, group):
        return bias.view_as(bias) if group.rank() == 0 else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


class RowParallelGroupedLinear(_GroupedLinear):
    partition_dim = 1

    def forward(self, x, tokens_per_expert):
        """Likewise, and the biases, which TEGroupedMLP adds times the tokens' routing weights."""
        out = self._multiply(x, tokens_per_expert, [None] * self.num_gemms)
        if not self.biased:
            return out, None
        return out, [_OnFirstRank.apply(bias, self.groups.expt_tp) for bias in self.biases]


EXPERTS = (
    TEGroupedMLP,
    GroupedMLPSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear),
)
