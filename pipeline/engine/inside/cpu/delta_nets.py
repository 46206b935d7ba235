"""Gated delta nets on a CPU, for which SGLang 0.5.23 asks `sgl_kernel` for five functions that need AMX.

A request's state in a layer is [value heads, value dim, key dim] float32, and the last tokens before the convolution.
A prompt is computed in chunks, as the trainer computes it (`megatron_ext/model/delta_rule.py`); a single token by
`kernels.delta_step`.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.model import delta_rule
from pipeline.engine.inside.cpu import kernels


@functools.cache
def install() -> None:
    """Put the functions where SGLang looks for them; call before its backend for linear attention is imported."""
    module: Any = types.ModuleType("sgl_kernel.mamba")
    module.causal_conv1d_fn_cpu = convolve
    module.causal_conv1d_update_cpu = convolve_token
    module.chunk_gated_delta_rule_cpu = extend
    sys.modules["sgl_kernel.mamba"] = module
    from sglang.kernels.ops.attention.fla.fused_norm_gate import FusedRMSNormGated

    FusedRMSNormGated.forward = norm_and_gate  # pyright: ignore[reportAttributeAccessIssue]
    _library.define("fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)")
    _library.impl("fused_gdn_gating_cpu", gates, "CPU")
    _library.define(
        "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, "
        "Tensor a, Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, "
        "bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) -> Tensor"
    )
    _library.impl("fused_sigmoid_gating_delta_rule_update_cpu", step, "CPU")


_library = torch.library.Library("sgl_kernel", "FRAGMENT")


def declare(*names: str) -> None:
    """Let these be found among torch's operators; to call one is an error."""
    for name in names:
        _library.define(f"{name}(Tensor x) -> Tensor")


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    **_: Any,
) -> Tensor:
    """The causal convolution of prompts. x: [channels, tokens]; weight: [channels, W]. conv_states:
    [slots, channels, W - 1], moved on in place. has_initial_state, cache_indices: [requests]. Returns as x."""
    before, slots = weight.shape[1] - 1, cache_indices.long()
    state = conv_states[slots].masked_fill(~has_initial_state[:, None, None], 0)
    cu = query_start_loc.tolist()
    joined = [torch.cat([s.to(x.dtype), x[:, a:b]], 1) for s, a, b in zip(state, cu, cu[1:], strict=False)]
    conv_states[slots] = torch.stack([part[:, part.shape[1] - before :] for part in joined]).to(conv_states.dtype)
    longer = torch.tensor([0, *(part.shape[1] for part in joined)]).cumsum(0)
    out = delta_rule.causal_conv1d(torch.cat(joined, 1).t()[None], weight, bias, activation, longer)[0]
    own = torch.cat([torch.arange(a + before, b) for a, b in zip(longer.tolist(), longer.tolist()[1:], strict=False)])
    return out[0, own].t()


def convolve_token(
    x: Tensor,
    conv_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    conv_state_indices: Tensor,
    **_: Any,
) -> Tensor:
    """The same of one token a request. x: [requests, channels]. Returns as x."""
    slots = conv_state_indices.long()
    window = torch.cat([conv_states[slots].to(x.dtype), x[..., None]], -1)
    conv_states[slots] = window[..., 1:].to(conv_states.dtype)
    out = (window.float() * weight.float()).sum(-1)
    out = out if bias is None else out + bias
    return (F.silu(out) if activation in ("silu", "swish") else out).to(x.dtype)


def gates(decay: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(logarithm of what a state keeps, share of the new value), [1, tokens, value heads] float32 of a, b:
    [tokens, value heads]."""
    kept = -decay.float().exp() * F.softplus(a.float() + bias.float())
    return kept[None], torch.sigmoid(b.float())[None]


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    **_: Any,
) -> tuple[Tensor, None, None]:
    """Prompts. q, k: [1, tokens, key heads, dim]; v: [1, tokens, value heads, dim]; g, beta: [1, tokens, value heads].
    initial_state: of all slots, moved on in place. Returns as v."""
    slots, group = initial_state_indices.long(), v.shape[2] // k.shape[2]
    q, k = (delta_rule.l2norm(t.float()).repeat_interleave(group, 2) for t in (q, k))
    before = initial_state[slots].transpose(-1, -2)
    out, after = delta_rule.chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=before, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert after is not None
    initial_state[slots] = after.transpose(-1, -2).to(initial_state.dtype)
    return out, None, None


def step(
    decay: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    states: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    normalised: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> Tensor:
    """One token a request: [1, requests, heads, dim] each. states: of all slots, moved on in place. Returns as v."""
    g, beta = gates(decay, a, b, bias)
    out = torch.empty(v.shape[1:], dtype=torch.float32)
    query, key, value = (t[0].float().contiguous().numpy() for t in (q, k, v))
    given = g[0].numpy(), beta[0].numpy(), states.numpy(), slots.long().numpy()
    kernels.delta_step(query, key, value, *given, out.numpy())
    return out[None].to(v.dtype)


def norm_and_gate(norm: Any, x: Tensor, gate: Tensor, *_: Any, **__: Any) -> Tensor:
    """FusedRMSNormGated.forward and RMSNorm.forward of `fla`, there Triton kernels: the norm of x, [rows, dim], times
    silu(gate)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    return (wide * F.silu(gate.float())).to(x.dtype)
