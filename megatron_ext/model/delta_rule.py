"""The gated delta rule and its causal convolution in plain torch, over packed sequences (2412.06464, equation 10).

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t / sqrt(d)

Within a chunk of tokens, with G_t the sum of its g up to t, the values that the state really takes up are

    U = (I + strictly lower [beta_i k_i.k_j exp(G_i - G_j)])^(-1) (beta V - beta exp(G) K S)       (section 3.3)

so a chunk costs matrix products, and only the state goes from one to the next. Sequences whose lengths lie within a
factor of two are computed together; no state and no token of one reaches another.

The functions have the signatures of `fla`'s (flash-linear-attention), for which Megatron-Core 0.19.2 asks.
`pipeline/engine/inside/cpu/delta_nets.py` has them compute prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 64


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum of x^2 + eps)."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """silu of y_t = bias + sum_j weight_j x_{t - W + 1 + j}, a filter a channel, within each sequence.

    x: [rows, tokens, channels]. weight: [channels, W]. cu_seqlens: [sequences + 1], where there is one row. Computed in
    float32, returned in the dtype of x.
    """
    tokens = x.shape[1]
    position = torch.arange(tokens, device=x.device)
    if cu_seqlens is not None:
        cu = cu_seqlens.to(x.device, torch.int64)
        position = position - torch.repeat_interleave(cu[:-1], cu[1:] - cu[:-1], output_size=tokens)

    def filtered(x: Tensor, weight: Tensor) -> Tensor:
        dtype, x, weight = x.dtype, x.float(), weight.float()
        out = x * weight[:, -1]
        for back in range(1, min(weight.shape[1], tokens)):
            earlier = F.pad(x[:, :-back], (0, 0, back, 0))
            out = out + (earlier * (position >= back)[:, None]) * weight[:, -1 - back]
        out = out if bias is None else out + bias
        return (F.silu(out) if activation in ("silu", "swish") else out).to(dtype)

    return _Again.apply(filtered, x, weight), None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """q, k: [rows, tokens, heads, key]; v: [rows, tokens, heads, value]; g, beta: [rows, tokens, heads].

    cu_seqlens: [sequences + 1], where there is one row. initial_state: [sequences, heads, key, value], of each at its
    start; None: empty. Returns as v, and, where it is asked for, the states at the ends.
    """
    if output_final_state:
        return _sequences(q, k, v, g, beta, initial_state, cu_seqlens)
    assert initial_state is None  # no gradient goes into it
    return _Again.apply(lambda *parts: _sequences(*parts, None, cu_seqlens)[0], q, k, v, g, beta), None


class _Again(torch.autograd.Function):
    """function(*tensors), of which nothing is kept but the tensors: backward computes it again."""

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.function(*tensors)
        return None, *torch.autograd.grad(out, tensors, grads)


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `chunk_gated_delta_rule`."""
    if cu_seqlens is None:
        return _delta_rule(q, k, v, g, beta, initial_state)
    starts, lengths = cu_seqlens.tolist(), (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    together: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        if length:
            together.setdefault(length.bit_length(), []).append(number)
    parts, places, ends = [], [], []
    for members in together.values():
        offset = torch.arange(max(lengths[i] for i in members))
        real = (offset < torch.tensor([lengths[i] for i in members])[:, None]).to(v.device)
        place = (torch.tensor([starts[i] for i in members])[:, None] + offset).clamp(max=v.shape[1] - 1).to(v.device)
        # behind a sequence's end stands another, which nothing before it reads and the state does not take up
        g_, beta_ = (t[0][place] * real[..., None] for t in (g, beta))
        first = None if initial_state is None else initial_state[members]
        out, last = _delta_rule(*(t[0][place] for t in (q, k, v)), g_, beta_, first)
        parts.append(out[real])
        places.append(place[real])
        ends.append((members, last))
    whole = torch.cat(parts)[torch.argsort(torch.cat(places))][None]
    empty = v.new_zeros(len(lengths), v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    states = empty if initial_state is None else initial_state.float().clone()
    for members, last in ends:
        states[members] = last
    return whole, states


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As above, every row a sequence; computed in float32."""
    dtype, tokens, scale = v.dtype, v.shape[1], q.shape[-1] ** -0.5
    chunk = min(_CHUNK, tokens)
    padding = -tokens % chunk

    def chunks(t: Tensor) -> Tensor:  # [rows, tokens, heads, ...] -> [rows, heads, chunks, chunk, ...]
        t = F.pad(t.float().transpose(1, 2), (0, 0) * (t.dim() - 3) + (0, padding))
        return t.unflatten(2, (-1, chunk))

    q, k, v, g, beta = (chunks(t) for t in (q, k, v, g, beta))
    q = q * scale
    total = g.cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=g.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    weighted = k * beta[..., None]
    system = (weighted @ k.transpose(-1, -2)) * decay  # its diagonal is taken for 1
    both = torch.cat([v * beta[..., None], weighted * total.exp()[..., None]], -1)
    values, reading = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    inside = (q @ k.transpose(-1, -2)) * decay
    asking = q * total.exp()[..., None]
    leaving = k * (total[..., -1:] - total).exp()[..., None]
    left = total[..., -1].exp()[..., None, None]
    none = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    now: Tensor = none if state is None else state.float()
    outputs = []
    for i in range(v.shape[2]):
        new = values[:, :, i] - reading[:, :, i] @ now
        outputs.append(asking[:, :, i] @ now + inside[:, :, i] @ new)
        now = now * left[:, :, i] + leaving[:, :, i].transpose(-1, -2) @ new
    return torch.cat(outputs, 2)[:, :, :tokens].transpose(1, 2).to(dtype), now
