"""Core attention on torch's SDPA: grouped-query, causal, packed sequences, context parallel. No Transformer Engine.

All sequences of a micro-batch go into few batched calls: sequences whose padded lengths lie within a factor of two
share one. Where context parallelism splits a sequence, every rank gathers the keys and values of all and attends with
its own queries; the gradient is scattered back by a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.layout import zigzag_positions
from megatron_ext.mcore import AttnMaskType, MegatronModule


class _GatherRanks(torch.autograd.Function):
    """[t, ...] on each rank -> [ranks * t, ...]; backward sums over the ranks and keeps this rank's part."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        out = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


@dataclass(frozen=True)
class _Bucket:
    """Sequences of similar length. Indices of padding point at place 0; its outputs are never read.

    query: [sequences, longest local part] places among this rank's tokens.
    key:   [sequences, longest] places among all ranks' tokens, rank by rank.
    mask:  [sequences, 1, queries, keys] bool, or None where a plain causal mask is right.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None


def _plan(lengths: list[int], cp_size: int, cp_rank: int) -> tuple[list[_Bucket], torch.Tensor]:
    """Buckets of a packed sequence, and where each local token's output lies among the buckets' outputs."""
    local_total = sum(lengths) // cp_size
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n // cp_size)
    members: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        if n:
            members.setdefault(n.bit_length(), []).append(i)
    buckets, back, base = [], torch.empty(local_total, dtype=torch.int64), 0
    for group in members.values():
        longest = max(lengths[i] for i in group)
        queries = longest // cp_size
        query = torch.zeros(len(group), queries, dtype=torch.int64)
        key = torch.zeros(len(group), longest, dtype=torch.int64)
        mask = torch.zeros(len(group), 1, queries, longest, dtype=torch.bool) if cp_size > 1 else None
        for row, i in enumerate(group):
            n, start = lengths[i], starts[i]
            mine = torch.arange(start, start + n // cp_size)
            query[row, : len(mine)] = mine
            back[mine] = base + row * queries + torch.arange(len(mine))
            for rank in range(cp_size):
                key[row, zigzag_positions(n, cp_size, rank)] = rank * local_total + mine
            if mask is not None:
                position = torch.zeros(queries, dtype=torch.int64)
                position[: len(mine)] = zigzag_positions(n, cp_size, cp_rank)
                mask[row, 0] = position[:, None] >= torch.arange(longest)[None]
        buckets.append(_Bucket(query, key, mask))
        base += query.numel()
    return buckets, back


class SDPACoreAttention(MegatronModule):
    """Megatron-Core's core-attention interface. query [t, heads, d], key and value [t, kv heads, d] with
    `packed_seq_params`, or all with a batch axis [t, b, heads, d]. Returns [t, heads * d] or [t, b, heads * d]."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        **_,
    ):
        super().__init__(config=config)
        if (config.attention_dropout if attention_dropout is None else attention_dropout) != 0.0:
            raise ValueError("attention without Transformer Engine has no dropout; set attention_dropout=0")
        assert pg_collection is not None
        self.scale, self.attn_mask_type, self.cp = softmax_scale, attn_mask_type, pg_collection.cp

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        /,
        *,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
        **_,
    ):
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or attention_bias is not None:
            raise ValueError(f"only causal attention without a bias is computed here, not {mask_type}")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp.size() > 1:
            raise ValueError("context parallelism without Transformer Engine needs packed sequences")
        return self._attend(*(t.transpose(0, 1) for t in (query, key, value)), None).transpose(0, 1)

    def _attend(self, q, k, v, mask):
        """[b, queries, heads, d], [b, keys, kv heads, d] -> [b, queries, heads * d]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(2)

    def _packed(self, q, k, v, params):
        plan = getattr(params, "sdpa_plan", None)
        if plan is None:  # one plan serves every layer of the micro-batch, forward and recomputed
            cu = params.cu_seqlens_q_padded if params.cu_seqlens_q_padded is not None else params.cu_seqlens_q
            plan = params.sdpa_plan = _plan((cu[1:] - cu[:-1]).tolist(), self.cp.size(), self.cp.rank())
        buckets, back = plan
        if self.cp.size() > 1:
            k, v = _GatherRanks.apply(torch.cat([k, v], -1), self.cp).split([k.shape[-1], v.shape[-1]], -1)  # type: ignore[union-attr]
        outs = [
            self._attend(q[b.query], k[b.key], v[b.key], b.mask).flatten(0, 1)  # [sequences * queries, heads * d]
            for b in buckets
        ]
        return (torch.cat(outs) if len(outs) > 1 else outs[0])[back]
