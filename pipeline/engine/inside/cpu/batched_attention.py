"""Attention on the CPU for many short sequences at once: an attention backend for SGLang 0.5.23. float32 only.

SGLang's own `torch_native` backend calls torch once per sequence and layer; at 256 requests that loop takes most of
the time. Here every token whose query stands alone or in a short prompt goes through one compiled loop that reads
the paged KV cache in place. Only a long run of queries of one sequence (a long prompt) still goes to torch, where
blocked attention is faster. Which token goes where is settled once per forward pass, not per layer.
Results differ from `torch_native` by the order of sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from pipeline.engine.inside.cpu import kernels
from pipeline.engine.inside.cpu.together import together

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_LONG_QUERY = 128  # queries of one sequence from which on torch is faster
_WORTH_THREADS = 2**19  # multiplications that take about as long as a thread to begin


@dataclass(frozen=True)
class LongQuery:
    """One sequence's queries: flat tokens start .. end, at positions prefix .. prefix + end - start."""

    start: int
    end: int
    prefix: int
    slots: torch.Tensor  # [prefix + end - start] int64, of its keys and values

    def blocks(self, window: int) -> Iterator[LongQuery]:
        """The same in parts, none of which holds many keys that none of its queries sees."""
        if window >= len(self.slots):
            yield self
            return
        for start in range(self.start, self.end, max(window, _LONG_QUERY)):
            end = min(start + max(window, _LONG_QUERY), self.end)
            seen = self.prefix + start - self.start  # tokens before the first query
            first = max(0, seen - window)
            yield LongQuery(start, end, seen - first, self.slots[first : seen + end - start])


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
    *,
    value_dim: int | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query: [tokens, heads, dim]. caches: [slots, kv heads, dim]. slot_table: int32.

    value_dim: a value is the first of so many of its numbers; None: it is all. window: tokens before its own that a
    query sees, at most; None: all. sinks: [heads], see `kernels.causal_attention`.
    Returns [tokens, heads, value_dim] float32.
    """
    query = query.contiguous()
    value_dim = value_cache.shape[2] if value_dim is None else value_dim
    output = query.new_empty(*query.shape[:2], value_dim)
    window = slot_table.shape[1] if window is None else window
    no_sinks = torch.full((query.shape[1],), -torch.inf)
    before = (query.numpy(), key_cache.numpy(), value_cache.numpy(), slot_table.numpy())
    behind = (np.float32(scale), window, (no_sinks if sinks is None else sinks.detach()).numpy(), output.numpy())
    counters, tokens = np.zeros(2, np.int64), plan.single_tokens
    work = partial(kernels.causal_attention, *before, tokens, plan.rows, plan.positions, *behind, counters)
    if int((plan.positions[tokens] + 1).sum()) * query.shape[1] * query.shape[2] < _WORTH_THREADS:
        work(True)
    else:
        together(work)
    for part in plan.long_queries:
        for block in part.blocks(window):
            q = query[block.start : block.end].transpose(0, 1)
            k = key_cache[block.slots].transpose(0, 1)
            v = value_cache[block.slots].transpose(0, 1)
            out = _attend_long(q, k, v, block.prefix, window, scale, sinks)
            output[block.start : block.end] = out[..., :value_dim].transpose(0, 1)
    return output


def _attend_long(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix: int,
    window: int,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q: [heads, queries, dim]; k, v: [kv heads, prefix + queries, dim]. On torch's kernel, which tells the
    log-sum-exp of a query's scores, so that a sink can be put beside them. Returns as `q`."""
    mask = None
    if prefix > 0 or window < q.shape[1]:
        back = torch.arange(prefix, prefix + q.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = torch.zeros(back.shape).masked_fill_((back < 0) | (back > window), -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale)
    if sinks is not None:
        out = out * torch.exp(lse - torch.logaddexp(lse, sinks[:, None]))[..., None]
    return out[0]


class BatchedAttentionBackend(AttentionBackend):
    """Causal self-attention over SGLang's KV pool, with sliding windows, sinks, and the latents of latent attention in
    the place of keys and values. Logit caps and half precision are refused."""

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
        if forward_batch.forward_mode.is_decode_or_idle():  # idle: attention is skipped, its padding is none's
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
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, sinks)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER or layer.logit_cap > 0:
            raise NotImplementedError("batched CPU attention is causal self-attention without a logit cap")
        pool, window = self.token_to_kv_pool, layer.sliding_window_size
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        if values.data_ptr() == keys.data_ptr():  # of latent attention: a value is the first part of its key
            values = keys
        output = attend(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            keys,
            values,
            self.req_to_token_pool.req_to_token,
            self.plan,
            layer.scaling,
            value_dim=layer.v_head_dim,
            window=None if window is None or window < 0 else window,
            sinks=sinks,
        )
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def support_triton(self) -> bool:
        return False
