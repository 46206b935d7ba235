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


class _Products(torch.autograd.Function):
    """x_e w_e^T of every expert e: one product each, written where it belongs.

    x: [tokens sorted by expert, input]; counts: tokens of each; weights: [output, input] each. Returns [tokens,
    output]. A weight with a `main_grad` of its dtype, Megatron-Core's buffer that gradients are summed in, has its
    gradient added there by the product itself.
    """

    @staticmethod
    def forward(ctx, x, counts, *weights):
        ctx.counts, ctx.weights = counts, weights  # parameters, by which their buffers are found
        ctx.save_for_backward(x, *weights)
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for part, into, weight in zip(x.split(counts), out.split(counts), weights, strict=True):
            torch.mm(part, weight.t(), out=into)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        parts = (x.split(ctx.counts), grad.split(ctx.counts))
        if of_x is not None:
            for own, into, weight in zip(parts[1], of_x.split(ctx.counts), weights, strict=True):
                torch.mm(own, weight, out=into)
        of_weights = [
            _gradient(weight, part, own) if needed else None
            for weight, part, own, needed in zip(ctx.weights, *parts, ctx.needs_input_grad[2:], strict=True)
        ]
        return of_x, None, *of_weights


def _gradient(weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """Of a weight from its inputs and the gradient of its outputs; None where it has been added to the buffer."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype:
        return torch.mm(grad.t(), x)
    buffer.addmm_(grad.t(), x)
    return None


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
        counts = [int(n) for n in tokens_per_expert]
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        if biases[0] is None:
            return _Products.apply(x, counts, *weights)
        return torch.cat([F.linear(*each) for each in zip(x.split(counts), weights, biases, strict=True)])

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
