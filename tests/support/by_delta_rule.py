"""The gated delta rule by its definition (2412.06464, equation 10), in float64 and a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence. q, k: [tokens, heads, key]; v: [tokens, heads, value]; g, beta: [tokens, heads]. state:
    [heads, key, value]. Returns what it says, as v, and the state behind it."""
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    state = v.new_zeros(*k.shape[1:], v.shape[2]) if state is None else state.double()
    said = []
    for t in range(len(q)):
        identity = torch.eye(k.shape[2], dtype=torch.float64)
        erase = identity - beta[t, :, None, None] * k[t, :, :, None] * k[t, :, None, :]
        write = beta[t, :, None, None] * k[t, :, :, None] * v[t, :, None, :]
        state = g[t].exp()[:, None, None] * (erase @ state) + write
        said.append(torch.einsum("hkv,hk->hv", state, q[t]) * k.shape[2] ** -0.5)
    return torch.stack(said), state


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of one filter a channel. x: [tokens, channels]; weight: [channels, W]. Nothing stands before the first."""
    x, weight = x.double(), weight.double()
    width, rows = weight.shape[1], []
    for t in range(len(x)):
        taps = [x[t - width + 1 + j] * weight[:, j] for j in range(width) if t - width + 1 + j >= 0]
        rows.append(torch.stack(taps).sum(0))
    return torch.nn.functional.silu(torch.stack(rows))


def random_sequences(lengths: list[int], heads: int, key: int, value: int) -> tuple[Tensor, ...]:
    """(q, k, v, g, beta), packed: [tokens, heads, ...], keys of length 1, decays from nothing to nearly all."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    q, k = (torch.randn(tokens, heads, key, generator=draw) for _ in range(2))
    v = torch.randn(tokens, heads, value, generator=draw)
    g = -torch.rand(tokens, heads, generator=draw).pow(4) * 5
    k = torch.nn.functional.normalize(k, dim=-1)
    return q, k, v, g, torch.rand(tokens, heads, generator=draw)
