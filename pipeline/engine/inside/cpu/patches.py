"""What is replaced in SGLang 0.5.23, in memory, when the batched CPU backend is chosen. Nothing else is.

Every replacement takes the original as its first argument and calls it for the cases that it does not cover, so
that a model with other norms, rotations, activations or dtypes runs as SGLang runs it. The reason for each is time
(`python scripts/bench_rollout.py` measures all of them together); the equality of each is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pybase64
import torch
import torch.nn.functional as F

from megatron_ext.cpu.freed_memory import keep_freed_memory
from pipeline.engine.inside.cpu import few_rows, kernels


def install(*, same_bits: bool) -> None:
    """Put all replacements in place; call once, in the scheduler's process.

    same_bits: what a row becomes must not depend on how many there are beside it, so a product of few rows is left to
    the library as one of many is (`batch_invariance.py`).
    """
    from sglang.srt.layers import layernorm, sampler
    from sglang.srt.layers.moe import fused_moe_native, topk
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.models import qwen3_moe

    keep_freed_memory()
    _replace(layernorm.RMSNorm, "forward_native", rms_norm)
    _replace(qwen3_moe.Qwen3MoeAttention, "apply_qk_norm_rope", norm_and_rotate)
    _replace(topk, "fused_topk_native", top_of_softmax)
    _replace(fused_moe_native, "moe_forward_native", partial(mixture_of_experts, own=not same_bits))
    _replace(RotaryEmbedding, "forward_native", rotate)
    _replace(memory_pool, "_set_kv_buffer_impl", store)
    _replace(sampler, "sampling_from_probs_torch", sample)
    _replace(SchedulerBatchResultProcessor, "_maybe_collect_routed_experts", collect_routes)


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, replaced)


def rms_norm(
    original: Callable[..., Any],
    norm: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    """RMSNorm.forward_native: six operations become one."""
    plain = norm.has_weight and norm.variance_size_override is None and post_residual_addition is None
    if not plain or x.dtype != torch.float32 or norm.weight.dtype != torch.float32:
        return original(norm, x, residual, post_residual_addition, quant_linear)
    rows = x.reshape(-1, norm.hidden_size).contiguous()
    weight, epsilon = norm.weight.detach().numpy(), np.float32(norm.variance_epsilon)
    output = torch.empty_like(rows)
    if residual is None:
        kernels.rms_norm(rows.numpy(), weight, epsilon, output.numpy())
        return output.view(x.shape)
    new_residual = torch.empty_like(rows)
    kernels.add_rms_norm(
        rows.numpy(), residual.view(rows.shape).numpy(), weight, epsilon, output.numpy(), new_residual.numpy()
    )
    return output.view(x.shape), new_residual.view(x.shape)


def norm_and_rotate(
    original: Callable[..., Any], attention: Any, qkv: torch.Tensor, positions: torch.Tensor, forward_batch: Any
) -> Any:
    """Qwen3MoeAttention.apply_qk_norm_rope: two norms and the rotation in one pass over `qkv`."""
    rotary = attention.rotary_emb
    plain = type(rotary).__name__ == "RotaryEmbedding" and rotary.is_neox_style
    if not plain or rotary.rotary_dim != attention.head_dim or qkv.dtype != torch.float32:
        return original(attention, qkv, positions, forward_batch)
    kernels.norm_and_rotate(
        qkv.numpy(),
        attention.num_heads,
        attention.num_kv_heads,
        attention.q_norm.weight.detach().numpy(),
        attention.k_norm.weight.detach().numpy(),
        np.float32(attention.q_norm.variance_epsilon),
        rotary.cos_sin_cache.numpy(),
        positions.numpy(),
    )
    return qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)


def rotate(
    original: Callable[..., Any],
    rotary: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    *others: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RotaryEmbedding.forward_native of whole heads: thirty operations become two passes."""
    plain = not others and not any(value is not None for value in named.values()) and rotary.is_neox_style
    plain = plain and rotary.rotary_dim == rotary.head_size
    plain = plain and hasattr(rotary, "cos_sin_cache") and not hasattr(rotary, "sin_cos_cache")
    shaped = query.dim() == key.dim() == 2 and positions.shape == query.shape[:1] == key.shape[:1]
    shaped = shaped and positions.dtype == torch.int64 and positions.is_contiguous()
    if not plain or not shaped or any(t.dtype != torch.float32 for t in (rotary.cos_sin_cache, query, key)):
        return original(rotary, positions, query, key, *others, **named)
    rotated = query.new_empty(query.shape), key.new_empty(key.shape)
    for given, output in zip((query, key), rotated, strict=True):
        kernels.rotate(given.numpy(), rotary.head_size, rotary.cos_sin_cache.numpy(), positions.numpy(), output.numpy())
    return rotated


def store(
    original: Callable[..., Any],
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indices: torch.Tensor,
    *others: Any,
    **named: Any,
) -> None:
    """memory_pool._set_kv_buffer_impl: a row is copied, where torch's indexing costs more to begin than to do."""
    given = (k, v, k_cache, v_cache)
    shaped = indices.dtype == torch.int64 and indices.shape == k.shape[:1] == v.shape[:1]
    if not shaped or not all(t.dtype == torch.float32 and t.dim() == 3 for t in given):
        original(*given, indices, *others, **named)
        return
    kernels.store_rows(k.numpy(), k_cache.numpy(), indices.numpy())
    kernels.store_rows(v.numpy(), v_cache.numpy(), indices.numpy())


def top_of_softmax(
    original: Callable[..., Any],
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None = None,
    scoring_func: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """fused_topk_torch_native of a softmax: eight operations become one."""
    plain = scoring_func == "softmax" and correction_bias is None and gating_output.dtype == torch.float32
    if not plain or not 0 < topk <= gating_output.shape[1]:
        return original(hidden_states, gating_output, topk, renormalize, correction_bias, scoring_func)
    shape = (gating_output.shape[0], topk)
    weights, experts = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)
    logits = gating_output.contiguous()
    kernels.top_of_softmax(logits.numpy(), renormalize, weights.numpy(), experts.numpy())
    return weights, experts


def mixture_of_experts(
    original: Callable[..., Any], layer: Any, x: torch.Tensor, topk_output: Any, config: Any, *, own: bool = True
) -> torch.Tensor:
    """moe_forward_native: sorting, activation and combination once for all experts, not per expert; and of experts
    that few rows go to, products of our own.

    -1 is an expert that another rank has (`parted.py`), and adds nothing; SGLang sums up the ranks behind.
    """
    plain = config.activation == "silu" and config.gemm1_alpha is None and not config.apply_router_weight_on_input
    biased = getattr(layer, "w13_weight_bias", None) is not None
    weights, expert_ids, _ = topk_output
    if not plain or biased or x.dtype != torch.float32:
        whole = (expert_ids >= 0).all()
        return (original if whole else partial(_of_own_experts, original))(layer, x, topk_output, config)
    order = np.empty(expert_ids.numel(), np.int64)
    starts = np.empty(layer.w13_weight.shape[0] + 2, np.int64)
    kernels.sort_by_expert(expert_ids.to(torch.int64).numpy(), order, starts)
    *ends, _ = starts.tolist()
    order = order[: ends[-1]]
    rows = order // expert_ids.shape[1]
    most = few_rows.most_rows(layer.w13_weight, layer.w2_weight) if own else 0
    if most:
        outputs = few_rows.experts(x, rows, layer.w13_weight, layer.w2_weight, starts[:-1], most)
    else:
        outputs = x.new_empty(len(rows), x.shape[1])
    spans = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(ends)) if b - a > most]
    if spans:
        _by_library(x, rows, layer, spans, outputs)
    result = torch.empty_like(x)
    kernels.combine_experts(outputs.numpy(), order, weights.to(torch.float32).contiguous().numpy(), result.numpy())
    return result


def _by_library(
    x: torch.Tensor, rows: np.ndarray, layer: Any, spans: list[tuple[int, int, int]], outputs: torch.Tensor
) -> None:
    """outputs[start:end] = what an expert makes of x[rows[start:end]]. spans: (expert, start, end)."""
    sizes = [end - start for _, start, end in spans]
    inputs = x.index_select(0, torch.from_numpy(np.concatenate([rows[start:end] for _, start, end in spans])))
    gate_up = x.new_empty(len(inputs), layer.w13_weight.shape[1])
    for (expert, _, _), part, out in zip(spans, inputs.split(sizes), gate_up.split(sizes), strict=True):
        torch.mm(part, layer.w13_weight[expert].t(), out=out)
    gate, up = gate_up.chunk(2, dim=1)
    for (expert, start, end), part in zip(spans, (F.silu(gate) * up).split(sizes), strict=True):
        torch.mm(part, layer.w2_weight[expert].t(), out=outputs[start:end])


def _of_own_experts(
    original: Callable[..., Any], layer: Any, x: torch.Tensor, topk_output: Any, config: Any
) -> torch.Tensor:
    """moe_forward_native of the choices whose experts this rank has, each as a token of its own."""
    weights, expert_ids, _ = topk_output
    tokens, choices = torch.where(expert_ids >= 0)
    result = weights.new_zeros(x.shape)
    if len(tokens):
        alone = {"topk_weights": weights.new_ones(len(tokens), 1), "topk_ids": expert_ids[tokens, choices, None]}
        each = original(layer, x[tokens], topk_output._replace(**alone), config)
        result.index_add_(0, tokens, each.to(weights.dtype) * weights[tokens, choices, None])
    return result.to(x.dtype)


def sample(
    original: Callable[..., Any],
    probabilities: torch.Tensor,
    sampling_seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """sampling_from_probs_torch: one uniform number a row, not one exponential a vocabulary entry."""
    if sampling_seed is not None or probabilities.dtype != torch.float32:
        return original(probabilities, sampling_seed, positions)
    uniforms = torch.rand(probabilities.shape[0], dtype=torch.float64)
    tokens = torch.empty(probabilities.shape[0], dtype=torch.int32)
    kernels.sample_rows(probabilities.contiguous().numpy(), uniforms.numpy(), tokens.numpy())
    return tokens


def collect_routes(original: Callable[..., Any], processor: Any, request: Any) -> None:
    """_maybe_collect_routed_experts: leaves the text that the HTTP server sends anyway, in place of a tensor.

    Between scheduler and HTTP server a tensor is pickled by torch.save, which costs more than the sampling of a token.
    """
    original(processor, request)
    if isinstance(request.routed_experts, torch.Tensor):
        request.routed_experts = pybase64.b64encode(request.routed_experts.numpy().tobytes()).decode()
