"""Core attention on torch's SDPA: grouped-query, causal, packed or padded, context parallel. No Transformer Engine.

    scores s_ij = scale q_i k_j                     for j <= i, and i - j < window where the layer has one
    weights p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))     sink: a number a head, where there are sinks (gpt-oss)

All sequences of a micro-batch go into few batched calls: sequences whose padded lengths lie within a factor of two
share one. Padded rows are a pack of sequences of one length. Where context parallelism splits a sequence, every rank
gathers the keys and values of all and attends with its own queries; the gradient is scattered back by a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.mcore import (
    AttnMaskType,
    MegatronModule,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from megatron_ext.zigzag import zigzag_positions


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


class _Spread(torch.autograd.Function):
    """Tokens to their places in the buckets of a plan: [t, ...] -> [places, ...]. Places of padding have a copy of
    token 0, which no output that is read depends on: it has no gradient."""

    @staticmethod
    def forward(ctx, x, places, back):
        ctx.save_for_backward(back)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, *grads):
        (back,) = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


class _Together(torch.autograd.Function):
    """The way back, [places, ...] -> [t, ...]; what stands at places of padding is not read."""

    @staticmethod
    def forward(ctx, x, places, back):
        ctx.save_for_backward(places, back)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, *grads):
        places, back = ctx.saved_tensors
        if len(places) == len(back):
            return grads[0].index_select(0, places), None, None
        out = grads[0].new_zeros(len(places), *grads[0].shape[1:])
        return out.index_copy_(0, back, grads[0]), None, None


class _SinkAttention(torch.autograd.Function):
    """Attention whose softmax has one more term, a sink a head, that no value belongs to. On torch's CPU kernel.

    q: [b, heads, queries, d]; k, v: [b, kv heads, keys, d]; sink: [heads]; mask: bool, or None for a causal one.
    With L = log(exp(sink) + sum exp(s)) in place of the kernel's log-sum-exp, its backward pass is right as it is.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, mask, scale):
        ctx.how = {"dropout_p": 0.0, "is_causal": mask is None, "scale": scale}
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, attn_mask=_additive(mask, q.dtype), **ctx.how)
        total = torch.logaddexp(lse, sink.float()[:, None])
        out = out * torch.exp(lse - total)[..., None].to(out.dtype)
        ctx.save_for_backward(q, k, v, sink, mask, out, total)
        return out

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, sink, mask, out, total = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = kernel(grads[0], q, k, v, out, total, attn_mask=_additive(mask, q.dtype), **ctx.how)
        weight = torch.exp(sink.float()[:, None] - total)
        dsink = -(weight * (grads[0] * out).float().sum(-1)).sum((0, 2))
        return dq, dk, dv, dsink.to(sink.dtype), None, None


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """0 where the bool mask is true, else minus infinity."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


@dataclass(frozen=True)
class _SameLength:
    """Sequences of similar length. Indices of padding point at place 0; its outputs are never read.

    query: [sequences, longest local part] places among this rank's tokens.
    key:   [sequences, longest] places among all ranks' tokens, rank by rank.
    mask:  [sequences or 1, 1, queries, keys] bool, or None where a plain causal mask is right.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """Buckets of a packed sequence. back: [tokens of this rank] where the output of each lies among the buckets'.
    places: [all queries of the buckets] the way there; None: one bucket without padding, in the order of the tokens."""

    buckets: list[_SameLength]
    back: torch.Tensor
    places: torch.Tensor | None


def _visible(positions: np.ndarray, keys: int, window: int | None) -> torch.Tensor:
    """[sequences, queries] places of queries in their sequences -> [sequences, 1, queries, keys] bool."""
    place, query = torch.arange(keys), torch.from_numpy(positions)[:, None, :, None]
    seen = place <= query  # a byte a pair, and nothing wider on the way: of 32,768 tokens on two ranks half a gigabyte
    return seen if window is None else seen & (place > query - window)


def _plan(lengths: list[int], cp_size: int, cp_rank: int, device: torch.device, window: int | None) -> _Plan:
    local_total = sum(lengths) // cp_size
    starts = np.cumsum([0, *(n // cp_size for n in lengths)])
    members: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        members.setdefault(n.bit_length(), []).append(i)
    buckets, back, base = [], np.empty(local_total, np.int64), 0
    for group in members.values():
        longest = max(lengths[i] for i in group)
        queries = longest // cp_size
        query = np.zeros((len(group), queries), np.int64)
        key = np.zeros((len(group), longest), np.int64)
        position = np.zeros((len(group), queries), np.int64)
        for row, i in enumerate(group):
            part = lengths[i] // cp_size
            mine = np.arange(starts[i], starts[i] + part)
            query[row, :part] = mine
            position[row, :part] = zigzag_positions(lengths[i], cp_size, cp_rank)
            back[mine] = np.arange(base + row * queries, base + row * queries + part)
            for rank in range(cp_size):
                key[row, zigzag_positions(lengths[i], cp_size, rank)] = rank * local_total + mine
        mask = None
        if cp_size > 1:
            mask = _visible(position, longest, window).to(device)
        elif window is not None and window < longest:
            mask = _visible(np.arange(longest)[None], longest, window).to(device)
        buckets.append(_SameLength(torch.from_numpy(query).to(device), torch.from_numpy(key).to(device), mask))
        base += query.size
    alike = len(buckets) == 1 and buckets[0].query.numel() == local_total
    places = None if alike else torch.cat([b.query.flatten() for b in buckets])
    return _Plan(buckets, torch.from_numpy(back).to(device), places)


class SDPACoreAttention(MegatronModule):
    """Megatron-Core's core-attention interface. query [t, heads, d], key and value [t, kv heads, d] with
    `packed_seq_params`, or all with a batch axis [t, b, heads, d]. Returns [t, heads * d] or [t, b, heads * d].

    softmax_offset: [heads of this rank], the sinks, of a config with softmax_type="learnable".
    window_size of the config is (tokens before the query that it still sees, 0)."""

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
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.tp, self.softmax_offset = pg_collection.tp, None
        if config.softmax_type == "learnable":
            sinks = torch.empty(config.num_attention_heads // self.tp.size(), dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(sinks)
            if config.perform_initialization:
                config.init_method(self.softmax_offset)
        elif config.softmax_type != "vanilla":
            raise ValueError(f"attention without Transformer Engine has no softmax_type={config.softmax_type!r}")

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

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
            return self._packed(query, key, value, self._plan_of(packed_seq_params, query.device))
        tokens, rows = query.shape[:2]
        if self.cp.size() == 1:
            mask = None
            if self.window is not None and self.window < tokens:
                mask = _visible(np.arange(tokens)[None], tokens, self.window).to(query.device)
            return self._attend(*(t.transpose(0, 1) for t in (query, key, value)), mask).transpose(0, 1)
        flat = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
        plan = _plan([tokens * self.cp.size()] * rows, self.cp.size(), self.cp.rank(), query.device, self.window)
        return self._packed(*flat, plan).view(rows, tokens, -1).transpose(0, 1)

    def _attend(self, q, k, v, mask):
        """[b, queries, heads, d], [b, keys, kv heads, d] -> [b, queries, heads * d]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.softmax_offset is not None:
            out = _SinkAttention.apply(q, k, v, self.softmax_offset, mask, self.scale)
            return out.transpose(1, 2).flatten(2)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(2)

    def _plan_of(self, params, device):
        """One plan serves every layer of the micro-batch with the same window, forward and recomputed."""
        plans = params.__dict__.setdefault("sdpa_plans", {})
        if self.window not in plans:
            cu = params.cu_seqlens_q_padded if params.cu_seqlens_q_padded is not None else params.cu_seqlens_q
            lengths = (cu[1:] - cu[:-1]).tolist()
            plans[self.window] = _plan(lengths, self.cp.size(), self.cp.rank(), device, self.window)
        return plans[self.window]

    def _packed(self, q, k, v, plan):
        def by_bucket(x):
            """[t, heads, d] of the queries' tokens -> [sequences, queries, heads, d] each."""
            spread = x if plan.places is None else _Spread.apply(x, plan.places, plan.back)
            sizes = [b.query.numel() for b in plan.buckets]
            parts = [spread] if len(sizes) == 1 else spread.split(sizes)
            return [part.view(*b.query.shape, *x.shape[1:]) for part, b in zip(parts, plan.buckets, strict=True)]

        if self.cp.size() > 1:
            whole = _GatherRanks.apply(torch.cat([k, v], -1), self.cp).split([k.shape[-1], v.shape[-1]], -1)
            keys, values = ([x[b.key] for b in plan.buckets] for x in whole)
        else:  # keys stand where their queries do
            keys, values = by_bucket(k), by_bucket(v)
        outs = [
            self._attend(q, k, v, b.mask).flatten(0, 1)  # [sequences * queries, heads * d]
            for q, k, v, b in zip(by_bucket(q), keys, values, plan.buckets, strict=True)
        ]
        joined = torch.cat(outs) if len(outs) > 1 else outs[0]
        return joined if plan.places is None else _Together.apply(joined, plan.places, plan.back)
