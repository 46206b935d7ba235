"""Floating-point operations of a pass over tokens.

    forward = 2 N_m sum_i l_i + L (q + v) sum_i l_i^2
    backward = 2 forward,  full recomputation = forward once more

N_m parameters of the matmuls that a token meets (the embedding is a look-up), l_i the tokens of sequence i, L layers,
q and v the widths of all heads' queries and values: a causal attention multiplies half of an l x l matrix, twice, at
two operations an element. (2104.04473, section 5.1 and appendix, with the experts that a token meets in place of all,
and half of the attention matrix.)
"""

from __future__ import annotations

from typing import Any

from pipeline.plan.parameters import active, architecture


def matmul_parameters(hf: dict[str, Any]) -> int:
    """Of `active`, those that multiply: without the embedding, unless it is the LM head too."""
    a = architecture(hf)
    return active(hf) - (0 if a.shape.tied_embeddings else a.shape.vocab_size * a.hidden)


def forward(hf: dict[str, Any], tokens: float, squares: float) -> float:
    """FLOPs of a forward pass. tokens: sum of the lengths. squares: sum of their squares."""
    a = architecture(hf)
    return 2.0 * matmul_parameters(hf) * tokens + a.layers * (a.query + a.value) * squares


def training(hf: dict[str, Any], tokens: float, squares: float, *, recompute: str = "none") -> float:
    """FLOPs of forward and backward. `selective` recomputes the (sparse) MLPs, `full` everything."""
    once = forward(hf, tokens, squares)
    if recompute == "full":
        return 4.0 * once
    if recompute == "selective":
        return 3.0 * once + 2.0 * mlp_parameters(hf) * tokens
    return 3.0 * once


def mlp_parameters(hf: dict[str, Any]) -> int:
    """Of `active`, those in what selective recomputation runs again: sparse MLPs, or all where there are no experts."""
    a = architecture(hf)
    if not a.moe:
        return 3 * a.hidden * a.ffn * a.layers
    return a.moe * a.hidden * (3 * (a.shape.topk * a.expert_ffn + a.shared_ffn) + a.shape.num_experts)
