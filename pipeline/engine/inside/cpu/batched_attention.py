"""Attention on the CPU for many short sequences at once: an attention backend for SGLang 0.5.23. float32 only.

SGLang's own `torch_native` backend calls torch once per sequence and layer; at 256 requests that loop takes most of
the time. Here every token whose query stands alone or in a short prompt goes through one compiled loop that reads
the paged KV cache in place. Only a long run of queries of one sequence (a long prompt) still goes to torch, where
blocked attention is faster. Which token goes where is settled once per forward pass, not per layer.
Results differ from `torch_native` by the order of sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from pipeline.engine.inside.cpu import kernels

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_LONG_QUERY = 128  # queries of one sequence from which on torch is faster


@dataclass(frozen=True)
class LongQuery:
    """One sequence's queries: flat tokens start .. end, at positions prefix .. prefix + end - start."""

    start: int
    end: int
    prefix: int
    slots: torch.Tensor  # [prefix + end - start] int64, of its keys and values


@dataclass(frozen=True)
class Plan:
    """Who computes which token of a batch. rows, positions: [tokens] int64, as in `kernels.causal_attention`."""

    rows: np.ndarray
    positions: np.ndarray
    single_tokens: np.ndarray
    long_queries: list[LongQuery]


def make_plan(slot_table: torch.Tensor, rows: list[int], prefixes: list[int], queries: list[int]) -> Plan:
    """slot_table: [requests, positions]. Per sequence: its row in it, its cached tokens, and its new ones (queries)."""
    counts = np.array(queries, np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets = np.arange(total) - np.repeat(ends - counts, counts)
    positions = offsets + np.repeat(np.array(prefixes, np.int64), counts)
    long_queries = [
        LongQuery(end - count, end, prefix, slot_table[row, : prefix + count].to(torch.int64))
        for row, prefix, count, end in zip(rows, prefixes, queries, ends.tolist(), strict=True)
        if count >= _LONG_QUERY
    ]
    single_tokens = np.flatnonzero(np.repeat(counts < _LONG_QUERY, counts))
    return Plan(np.repeat(np.array(rows, np.int64), counts), positions, single_tokens, long_queries)


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_table: torch.Tensor,
    plan: Plan,
    scale: float,
) -> torch.Tensor:
    """query: [tokens, heads, dim]. caches: [slots, kv heads, dim]. slot_table: int32. Returns as `query`, float32."""
    query = query.contiguous()
    output = torch.empty_like(query)
    if len(plan.single_tokens):
        kernels.causal_attention(
            query.numpy(),
            key_cache.numpy(),
            value_cache.numpy(),
            slot_table.numpy(),
            plan.single_tokens,
            plan.rows,
            plan.positions,
            np.float32(scale),
            output.numpy(),
        )
    for part in plan.long_queries:
        q = query[part.start : part.end].transpose(0, 1)
        k = key_cache[part.slots].transpose(0, 1)
        v = value_cache[part.slots].transpose(0, 1)
        mask = None
        if part.prefix > 0:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(part.prefix)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        output[part.start : part.end] = out[0].transpose(0, 1)
    return output


class BatchedAttentionBackend(AttentionBackend):
    """Causal self-attention over SGLang's KV pool. Sliding windows, logit caps and half precision are refused."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        if runner.dtype != torch.float32 or runner.kv_cache_dtype != torch.float32:
            raise NotImplementedError(f"batched CPU attention is float32 only, not {runner.dtype}")
        assert runner.req_to_token_pool is not None
        # By these names SGLang's models read them too.
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool: Any = runner.token_to_kv_pool
        self.plan = make_plan(torch.empty(0, 0), [], [], [])

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        rows = forward_batch.req_pool_indices.tolist()
        if forward_batch.forward_mode.is_decode():
            prefixes, queries = (forward_batch.seq_lens - 1).tolist(), [1] * len(rows)
        else:
            assert forward_batch.extend_prefix_lens is not None
            assert forward_batch.extend_seq_lens is not None
            prefixes = forward_batch.extend_prefix_lens.tolist()
            queries = forward_batch.extend_seq_lens.tolist()
        self.plan = make_plan(self.req_to_token_pool.req_to_token, rows, prefixes, queries)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        window = layer.sliding_window_size
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER or layer.logit_cap > 0:
            raise NotImplementedError("batched CPU attention is causal self-attention without a logit cap")
        if window is not None and window > -1:
            raise NotImplementedError("no sliding window on the batched CPU backend; use torch_native")
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        output = attend(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            self.plan,
            layer.scaling,
        )
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def support_triton(self) -> bool:
        return False
