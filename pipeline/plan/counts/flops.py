"""Floating-point operations of a pass over tokens.

    forward = 2 N_m sum_i l_i + L (q + v) sum_i l_i^2 + 6 L_d heads d_k d_v sum_i l_i
    backward = 2 forward,  full recomputation = forward once more,  adapters (`lora`): less 2 N_m, once

N_m parameters of the matmuls that a token meets (the embedding is a look-up), l_i the tokens of sequence i, L layers,
q and v the widths of all heads' queries and values: a causal attention multiplies half of an l x l matrix, twice, at
two operations an element. (2104.04473, section 5.1 and appendix, with the experts that a token meets in place of all,
and half of the attention matrix.) L_d layers are gated delta nets, and no part of L: a token reads its state, changes
it, and asks it, a product each (2412.06464, equation 10).
"""

from __future__ import annotations

from megatron_ext.config import LoraConfig, ParallelConfig
from megatron_ext.hf.description import ModelDescription
from pipeline.plan.counts.adapters import trained_count
from pipeline.plan.counts.parameters import active


def matmul_parameters(model: ModelDescription) -> int:
    """Of `active`, those that multiply: without the embedding, unless it is the LM head too."""
    return active(model) - (0 if model.tied_embeddings else model.vocab_size * model.hidden)


def forward(model: ModelDescription, tokens: float, squares: float) -> float:
    """FLOPs of a forward pass. tokens: sum of the lengths. squares: sum of their squares."""
    recurrent = 0
    if nets := len(model.delta_layers):
        net = model.delta_net
        recurrent = 6 * nets * net.value_heads * net.key_dim * net.value_dim
    attending = (model.num_layers - len(model.delta_layers)) * (model.query + model.value)
    return (2.0 * matmul_parameters(model) + recurrent) * tokens + attending * squares


def training(
    model: ModelDescription,
    tokens: float,
    squares: float,
    *,
    recompute: str = "none",
    lora: LoraConfig | None = None,
) -> float:
    """FLOPs of forward and backward. `selective` recomputes the (sparse) MLPs, `full` everything.

    lora: adapters are trained. Backward is then without gradients of the model's weights; the adapters' own products
    count three times."""
    if lora is not None:
        whole = training(model, tokens, squares, recompute=recompute)
        return whole + 2.0 * tokens * (3 * met(model, lora) - matmul_parameters(model))
    once = forward(model, tokens, squares)
    if recompute == "full":
        return 4.0 * once
    if recompute == "selective":
        return 3.0 * once + 2.0 * mlp_parameters(model) * tokens
    return 3.0 * once


def met(model: ModelDescription, lora: LoraConfig) -> int:
    """Parameters of adapters that multiply a token: of experts, the chosen ones'."""
    one = ParallelConfig.model_validate({})
    count = trained_count(model, one, lora.model_copy(update={"router": "frozen"}))
    return count.dense + count.expert * model.topk // max(1, model.num_experts)


def mlp_parameters(model: ModelDescription) -> int:
    """Of `active`, those in what selective recomputation runs again: sparse MLPs, or all where there are no experts."""
    if not model.moe_layers:
        return 3 * model.hidden * model.ffn * model.num_layers
    widths = 3 * (model.topk * model.expert_ffn + model.shared_ffn)
    return len(model.moe_layers) * model.hidden * (widths + model.num_experts)
