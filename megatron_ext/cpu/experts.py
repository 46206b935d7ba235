"""Grouped expert linears without Transformer Engine, so that Megatron-Core's own TEGroupedMLP runs on a CPU.

Parameters are called `weight0` .. `weight{n-1}` and saved under one key with an expert axis, as Transformer Engine's
grouped linears are: a checkpoint made here loads there, in any expert and tensor layout.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class _GroupedLinear(torch.nn.Module):
    partition_dim: int

    def __init__(self, num_gemms, input_size, output_size, *, config, init_method, bias=False, pg_collection, **_):
        super().__init__()
        if bias:
            raise ValueError("grouped experts without Transformer Engine have no bias; set add_bias_linear=False")
        self.num_gemms, self.groups = num_gemms, pg_collection
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

    def forward(self, x, tokens_per_expert):
        """x: [tokens sorted by expert, input]; tokens_per_expert: [num_gemms]. Returns ([tokens, output], no bias)."""
        parts = x.split([int(n) for n in tokens_per_expert])
        return torch.cat([part @ getattr(self, f"weight{i}").t() for i, part in enumerate(parts)]), None

    def backward_dw(self):
        """The weight gradient is computed in backward itself."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        out, ep = {}, self.groups.ep
        for i in range(self.num_gemms):
            axis = (len(sharded_offsets), ep.rank() * self.num_gemms + i, ep.size() * self.num_gemms)
            sharded = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{i}")},
                "",
                {"weight": self.partition_dim},
                (*sharded_offsets, axis),
                tp_group=self.groups.expt_tp,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )["weight"]
            sharded.key = prefix + "weight"
            sharded.replica_id = (*sharded.replica_id[:2], self.groups.expt_dp.rank())
            out[f"{prefix}weight{i}"] = sharded
        return out


class ColumnParallelGroupedLinear(_GroupedLinear):
    partition_dim = 0


class RowParallelGroupedLinear(_GroupedLinear):
    partition_dim = 1


EXPERTS = (
    TEGroupedMLP,
    GroupedMLPSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear),
)
