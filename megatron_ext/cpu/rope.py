"""Rotary embedding of packed sequences in one pass.

Megatron-Core's unfused path (0.19.2) loops over the sequences of a pack in Python, twice a layer, and joins halves by
copies: at 256 short sequences that is more time than the layer's matrix products. The values here are the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ext.cpu import row_functions as rows
from megatron_ext.zigzag import zigzag_positions


class _Rotate(torch.autograd.Function):
    """Pairs of t turned by their angles. t: [tokens, heads, d]; cos and sin: [tokens, 1, r / 2], r <= d.

    The pairs are (t_i, t_{i + r/2}), or (t_{2i}, t_{2i+1}) where they come `interleaved`; they leave as the former.
    What is behind the first r is not turned.
    """

    @staticmethod
    def forward(ctx, t, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        low, high = _pairs(2 * cos.shape[-1], interleaved)
        return _rotate(t, cos, sin, (low, high), _pairs(2 * cos.shape[-1], False))

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        rotated = 2 * cos.shape[-1]
        return _rotate(grads[0], cos, -sin, _pairs(rotated, False), _pairs(rotated, ctx.interleaved)), None, None, None


def _pairs(rotated: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the first and where the second of each pair stand."""
    if interleaved:
        return slice(0, rotated, 2), slice(1, rotated, 2)
    return slice(0, rotated // 2), slice(rotated // 2, rotated)


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, source: tuple[slice, slice], target: tuple[slice, slice]) -> Tensor:
    out, rotated = torch.empty(t.shape, dtype=t.dtype, device=t.device), 2 * cos.shape[-1]
    if source == target and rows.plain(t, cos, sin):
        own, turned, c, s = (rows.array(part) for part in (t, out, cos[:, 0], sin[:, 0]))
        rows.on_threads(lambda at: rows.loops().rotate_rows(own[at], c[at], s[at], turned[at]), len(t), t.numel())
        return out
    low, high = (t[..., s] for s in source)
    torch.mul(low, cos, out=out[..., target[0]]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out[..., target[1]]).addcmul_(low, sin)
    out[..., rotated:] = t[..., rotated:]
    return out


def packed_positions(cu_seqlens: Tensor, angles: int, cp_size: int, cp_rank: int) -> Tensor:
    """Which row of the angle table belongs to each local token. [tokens / cp] int64.

    cu_seqlens: [sequences + 1], padded, over all context ranks. angles: rows of the table; where it has a row for
    every token of the pack, each sequence begins at its own offset, else each begins at 0.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    parts = [zigzag_positions(n, cp_size, cp_rank) for n in lengths]
    if angles == int(cu_seqlens[-1]):
        parts = [p + start for p, start in zip(parts, cu_seqlens[:-1].tolist(), strict=True)]
    return torch.from_numpy(np.concatenate(parts))


def apply_packed(
    t,
    cu_seqlens,
    freqs,
    rotary_interleaved=False,
    mla_rotary_interleaved=False,
    mscale=1.0,
    cp_group=None,
    multi_latent_attention=None,
):
    """In place of `rope_utils._apply_rotary_pos_emb_thd`. t: [tokens, heads, d]; freqs: [angles, 1, 1, r], r <= d."""
    if cp_group is None:
        raise ValueError("cp_group must be provided for packed rotary embeddings")
    if rotary_interleaved or multi_latent_attention:
        raise NotImplementedError("packed rotary embedding on the CPU leaves pairs as halves, not interleaved")
    table = getattr(cu_seqlens, "rope_table", None)
    if table is None:  # the same for every layer of a micro-batch
        positions = packed_positions(cu_seqlens, freqs.size(0), cp_group.size(), cp_group.rank())
        angles = freqs[positions, 0, :, : freqs.shape[-1] // 2]
        table = cu_seqlens.rope_table = (angles.cos() * mscale, angles.sin() * mscale)
    cos, sin = (part.to(t.dtype) for part in table)
    return _Rotate.apply(t, cos, sin, mla_rotary_interleaved)


def install() -> None:
    """Put it in place."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_thd = apply_packed
