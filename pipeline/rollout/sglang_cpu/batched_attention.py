"""Attention on the CPU for many short sequences at once: an attention backend for SGLang 0.5.23.

SGLang's own `torch_native` backend calls the kernel once per sequence and layer; at 256 requests that loop takes most
of the time. Here the sequences of a batch are sorted into buckets of similar length, and each bucket is padded and
computed by one call:

    out[b, i] = softmax_j( scale * q[b, i] . k[b, j] + mask[b, i, j] ) v[b, j],  mask = 0 where j <= prefix[b] + i

A decode step is the case of one query per sequence. The indices and masks are made once per forward pass, not per
layer. Results differ from `torch_native` only by the order of sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_SHORTEST_BUCKET = 32  # tokens; shorter sequences share one bucket


@dataclass(frozen=True)
class Bucket:
    """B sequences of similar length, padded to Q queries and L keys.

    query_rows:  [B, Q] rows of the flat query; padding repeats the sequence's last row.
    output_rows: flat positions in [B * Q] that are not padding, in the order of `output_to`.
    output_to:   rows of the flat output.
    kv_slots:    [B * L] slots of the KV cache; padding points anywhere.
    mask:        [B, 1, Q, L] added to the scores, 0 or -inf; None: plain causal, Q = L, one sequence.
    """

    query_rows: torch.Tensor
    output_rows: torch.Tensor
    output_to: torch.Tensor
    kv_slots: torch.Tensor
    mask: torch.Tensor | None


def make_buckets(
    slot_table: torch.Tensor, prefix_lengths: list[int], query_lengths: list[int], dtype: torch.dtype
) -> list[Bucket]:
    """Sort sequences into buckets by the power of two above their length.

    slot_table: [B, at least max length] KV slot of every position of every sequence.
    prefix_lengths, query_lengths: [B] tokens before the first query, and queries; queries lie flat in this order.
    dtype: of the masks.
    """
    starts = [0]
    for length in query_lengths:
        starts.append(starts[-1] + length)
    members: dict[int, list[int]] = {}
    for i, (prefix, queries) in enumerate(zip(prefix_lengths, query_lengths, strict=True)):
        if queries > 0:
            members.setdefault(max(prefix + queries, _SHORTEST_BUCKET).bit_length(), []).append(i)
    return [
        _bucket(
            slot_table[sequences],
            torch.tensor([starts[i] for i in sequences]),
            torch.tensor([prefix_lengths[i] for i in sequences]),
            torch.tensor([query_lengths[i] for i in sequences]),
            dtype,
        )
        for sequences in members.values()
    ]


def _bucket(
    slot_table: torch.Tensor, starts: torch.Tensor, prefixes: torch.Tensor, queries: torch.Tensor, dtype: torch.dtype
) -> Bucket:
    query_count = int(queries.max())
    key_count = int((prefixes + queries).max())
    offsets = torch.arange(query_count)
    real = offsets < queries[:, None]
    query_rows = starts[:, None] + torch.minimum(offsets, queries[:, None] - 1)
    mask = None
    if len(starts) > 1 or int(prefixes[0]) > 0:
        last_key = prefixes[:, None] + offsets  # padding queries see more than they should; they are dropped
        hidden = torch.arange(key_count) > last_key[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    return Bucket(
        query_rows=query_rows,
        output_rows=real.flatten().nonzero().squeeze(1),
        output_to=query_rows[real],
        kv_slots=slot_table[:, :key_count].flatten().to(torch.int64),
        mask=mask,
    )


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    buckets: list[Bucket],
    scale: float,
) -> torch.Tensor:
    """query: [tokens, heads, dim]. caches: [slots, kv heads, dim]. Returns [tokens, heads, value dim]."""
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    output = query.new_empty(query.shape[0], heads, value_cache.shape[2])
    for bucket in buckets:
        count, queries = bucket.query_rows.shape
        q = query[bucket.query_rows]  # [B, Q, heads, dim]
        k = key_cache.index_select(0, bucket.kv_slots).view(count, -1, kv_heads, key_cache.shape[2]).transpose(1, 2)
        v = value_cache.index_select(0, bucket.kv_slots).view(count, -1, kv_heads, value_cache.shape[2]).transpose(1, 2)
        if queries == 1:  # the heads that share a KV head take the place of the queries
            q = q.view(count, kv_heads, heads // kv_heads, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask, scale=scale)
            output[bucket.query_rows[:, 0]] = out.reshape(count, heads, -1)
            continue
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=scale, enable_gqa=True
        )
        output[bucket.output_to] = out.transpose(1, 2).reshape(count * queries, heads, -1)[bucket.output_rows]
    return output


class BatchedAttentionBackend(AttentionBackend):
    """Causal self-attention over SGLang's KV pool. Sliding windows and logit caps are refused."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool  # by these names SGLang's models read them
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.dtype = runner.dtype
        self.buckets: list[Bucket] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        lengths = forward_batch.seq_lens.tolist()
        if forward_batch.forward_mode.is_decode():
            prefixes, queries = [length - 1 for length in lengths], [1] * len(lengths)
        else:
            prefixes = forward_batch.extend_prefix_lens.tolist()
            queries = forward_batch.extend_seq_lens.tolist()
        slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : max(lengths, default=0)]
        self.buckets = make_buckets(slots, prefixes, queries, self.dtype)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        window = layer.sliding_window_size
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER or layer.logit_cap > 0:
            raise NotImplementedError("batched CPU attention is causal self-attention without a logit cap")
        if window is not None and window > -1:
            raise NotImplementedError("batched CPU attention has no sliding window; use attention_backend: torch_native")
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        out = attend(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.buckets,
            layer.scaling,
        )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def support_triton(self) -> bool:
        return False
