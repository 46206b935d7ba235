"""What Transformer Engine's kernels compute, in torch: forward passes of its layers and the functions that
Megatron-Core calls. Each takes the arguments of what it replaces, and no other, so that a renamed argument is an error
here too.

Ranks: of tensor parallelism, with and without the sequence cut among them, and of context parallelism, where a sequence
is cut into twice as many chunks as there are ranks and rank r has the r-th from either end. They meet through
Megatron-Core's own collectives.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F


def _replace(owner: Any, name: str, function) -> None:
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def called(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(**bound.arguments)

    setattr(owner, name, called)


def _norm(x, weight, eps, zero_centered):
    return F.rms_norm(x, x.shape[-1:], (1.0 + weight.float()).to(weight.dtype) if zero_centered else weight, eps)


def _entered(self, x):
    """The input of a layer whose columns are cut: whole, of all ranks; its gradient is summed over them."""
    if self.parallel_mode != "column" or self.tp_size == 1:
        return x
    from megatron.core.tensor_parallel import mappings

    if self.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)


def _left(self, x):
    """The output of a layer whose rows are cut: summed over the ranks, each of which keeps its part of the sequence."""
    if self.parallel_mode != "row" or self.tp_size == 1:
        return x
    from megatron.core.tensor_parallel import mappings

    if self.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
    return mappings.reduce_from_tensor_model_parallel_region(x, group=self.tp_group)


def _linear_out(self, x, weight, bias):
    """A layer's output, and its bias beside it where the caller adds it."""
    out = _left(self, F.linear(_entered(self, x), weight))
    if self.return_bias:
        return out, bias
    return out + bias if self.use_bias else out


def _linear(self, inp, is_first_microbatch, fp8_output, fp8_grad):
    return _linear_out(self, inp, self.weight, self.bias)


def _norm_linear(self, inp, is_first_microbatch, fp8_output, fp8_grad):
    assert self.normalization == "RMSNorm"
    x = _norm(inp, self.layer_norm_weight, self.eps, self.zero_centered_gamma)
    return _linear_out(self, x, self.weight, self.bias)


def _grouped_linear(self, inp, m_splits, is_first_microbatch, out, dgrad_out):
    assert self.tp_size == 1, "Megatron-Core's dispatcher moves the tokens of experts that are cut"
    parts = inp.split([int(n) for n in m_splits])
    biases = [getattr(self, f"bias{i}") if self.use_bias else None for i in range(self.num_gemms)]
    added = [None if self.return_bias else bias for bias in biases]
    weights = (getattr(self, f"weight{i}") for i in range(self.num_gemms))
    result = torch.cat([F.linear(*each) for each in zip(parts, weights, added, strict=True)])
    return (result, biases) if self.return_bias else result


def _rms_norm(self, input, basic_op_kwargs=None, **_):
    return _norm(input, self.weight, self.eps, self.zero_centered_gamma)


def _attention(self, query_layer, key_layer, value_layer, attn_mask_type, window_size, qkv_format, **others):
    """[t, heads, d] of packed sequences, or [t, b, heads, d] -> the same with heads and channels in one."""
    assert attn_mask_type in ("causal", "padding_causal")
    window = self.window_size if window_size is None else window_size
    ranks = 1 if self.cp_group is None else self.cp_group.size()
    if qkv_format == "thd":
        ends = others["cu_seqlens_q_padded"] if others["cu_seqlens_q_padded"] is not None else others["cu_seqlens_q"]
        lengths = (ends[1:] - ends[:-1]).tolist()
        if ranks > 1:
            key_layer, value_layer = (_of_all_ranks(self, t, lengths) for t in (key_layer, value_layer))
        queries = query_layer.split([n // ranks for n in lengths])
        rows = zip(queries, key_layer.split(lengths), value_layer.split(lengths), strict=True)
        return torch.cat([_attend(self, q, k, v, window) for q, k, v in rows])
    assert ranks == 1
    rows = zip(*(t.unbind(1) for t in (query_layer, key_layer, value_layer)), strict=True)
    return torch.stack([_attend(self, q, k, v, window) for q, k, v in rows], 1)


def _of_all_ranks(self, x, lengths):
    """[t / ranks, ...] of this context rank -> [t, ...], every sequence in its order. lengths: of whole sequences."""
    from megatron.core.tensor_parallel import mappings

    ranks, mine = self.cp_group.size(), len(x)
    whole = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.cp_group)
    rows, start = torch.empty(sum(lengths), dtype=torch.long), 0
    for length in lengths:
        for rank in range(ranks):
            here = rank * mine + start // ranks
            rows[start + _places(length, ranks, rank)] = torch.arange(here, here + length // ranks)
        start += length
    return whole[rows]


def _places(length: int, ranks: int, rank: int):
    """[length / ranks] where the tokens of a context rank stand in their sequence."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def _attend(self, q, k, v, window):
    """[t, heads, d] of one sequence; of the queries those of this context rank."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * self.softmax_scale
    ranks = len(k) // len(q)
    at = _places(len(k), ranks, self.cp_group.rank()) if ranks > 1 else torch.arange(len(k))
    back = at[:, None] - torch.arange(len(k))
    seen = back >= 0 if window is None or window[0] < 0 else (back >= 0) & (back <= window[0])
    scores = scores.masked_fill(~seen, -torch.inf)
    if self.softmax_type == "learnable":
        sink = self.softmax_offset.view(-1, 1, 1).to(scores).expand(-1, len(q), 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        assert self.softmax_type == "vanilla"
        weights = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


def _gemm(A, B, out_dtype, layout, bias, accumulate, out, **_):
    """cuBLASLt takes a bias of the output's dtype and no other where nothing is fp8."""
    assert bias is None or bias.dtype == out_dtype, f"a bias of {bias.dtype} for an output of {out_dtype}"
    assert not accumulate
    assert out is None
    A, B = A.to(out_dtype), B.to(out_dtype)
    result = {"TN": lambda: B @ A.t(), "NN": lambda: B @ A, "NT": lambda: B.t() @ A}[layout]()
    return (result if bias is None else result + bias, None, None, None)


def _order(routing_map):
    """[tokens, experts] bool -> token and expert of each row, sorted by expert."""
    expert, token = routing_map.bool().t().nonzero(as_tuple=True)
    return token, expert


def _permute_with_probs(inp, probs, routing_map, num_out_tokens):
    token, expert = _order(routing_map)
    assert num_out_tokens in (-1, None, len(token))
    return inp[token], probs[token, expert], token


def _unpermute(inp, row_id_map, merging_probs, restore_shape, map_type, pad_offsets=None, **_):
    assert map_type == "mask"
    assert merging_probs is None
    assert pad_offsets is None
    return inp.new_zeros(tuple(restore_shape)).index_add(0, row_id_map, inp)


def _sort_chunks(inp, split_sizes, sorted_index, probs=None):
    parts = list(inp.split([int(n) for n in split_sizes]))
    return torch.cat([parts[int(i)] for i in sorted_index])


def _sort_chunks_with_probs(inp, probs, split_sizes, sorted_index):
    return _sort_chunks(inp, split_sizes, sorted_index), _sort_chunks(probs, split_sizes, sorted_index)


def _rotated(x, cos, sin, ends, rank, ranks):
    """[t, heads, channels], pairs of neighbours -> the same, all left parts first and then all right ones."""
    left, right = x[..., 0::2], x[..., 1::2]
    places = torch.cat(
        [_places(int(n), ranks, rank) if ranks > 1 else torch.arange(int(n)) for n in ends[1:] - ends[:-1]]
    )
    cos, sin = (part.flatten(1)[places][:, None].to(x.dtype) for part in (cos, sin))
    half = left.shape[-1]
    turned = left * cos[..., :half] - right * sin[..., :half], right * cos[..., half:] + left * sin[..., half:]
    return torch.cat(turned, -1)


def _latent_query(t, cos, sin, qk_head_dim, emb_dim, cu_seqlens_q, cp_rank, cp_size, **_):
    turned = _rotated(t[..., qk_head_dim:], cos, sin, cu_seqlens_q, cp_rank, cp_size)
    return torch.cat([t[..., :qk_head_dim], turned], -1)


def _latent_key_value(kv, k_pos_emb, cos, sin, emb_dim, k_dim, v_dim, cu_seqlens_kv, cp_rank, cp_size, **_):
    key, value = kv.split([k_dim, v_dim], -1)
    rotary = _rotated(k_pos_emb.view(len(kv), 1, emb_dim), cos, sin, cu_seqlens_kv, cp_rank, cp_size)
    return torch.cat([key, rotary.expand(-1, kv.shape[1], -1)], -1), value


def install() -> None:
    """Replace them; before Megatron-Core is imported, which takes some by name."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import cpp_extensions, permutation
    from transformer_engine.pytorch.attention import rope

    _replace(te.Linear, "forward", _linear)
    _replace(te.LayerNormLinear, "forward", _norm_linear)
    _replace(te.GroupedLinear, "forward", _grouped_linear)
    te.RMSNorm.forward = _rms_norm
    _replace(te.DotProductAttention, "forward", _attention)
    _replace(cpp_extensions, "general_gemm", _gemm)
    _replace(permutation, "moe_permute_with_probs", _permute_with_probs)
    _replace(permutation, "moe_unpermute", _unpermute)
    _replace(permutation, "moe_sort_chunks_by_index", _sort_chunks)
    _replace(permutation, "moe_sort_chunks_by_index_with_probs", _sort_chunks_with_probs)
    rotate = rope.apply_rotary_pos_emb  # without its kernel it is torch
    _replace(rope, "apply_rotary_pos_emb", lambda fused, **kwargs: rotate(fused=False, **kwargs))


def install_megatrons() -> None:
    """The same of Megatron-Core's own kernels, which are Triton's."""
    from megatron.core.transformer import multi_latent_attention as latent

    _replace(latent, "fused_apply_mla_rope_for_q", _latent_query)
    _replace(latent, "fused_apply_mla_rope_for_kv", _latent_key_value)
