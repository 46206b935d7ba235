"""Megatron-Core's gated delta net (2412.06464), as Qwen3-Next has it, in the place of attention in some layers."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import common, gdn
from torch import Tensor

from megatron_ext import cpu
from megatron_ext.mcore import (
    GatedDeltaNet,
    GatedDeltaNetSubmodules,
    IdentityOp,
    ModuleSpec,
    TransformerConfig,
    get_transformer_layer_offset,
)
from megatron_ext.model import delta_rule

log = logging.getLogger(__name__)


class DeltaNet(GatedDeltaNet):
    """Two things are not as in Megatron-Core 0.19.2. The norm of the output multiplies by its weight, where the model's
    others multiply by 1 + weight; and the decay is computed in float32, as in transformers and SGLang."""

    def __init__(self, config: TransformerConfig, submodules: GatedDeltaNetSubmodules, *args: Any, **kwargs: Any):
        super().__init__(config, submodules, *args, **kwargs)
        plain = copy.copy(config)
        plain.layernorm_zero_centered_gamma = False
        norm: Any = submodules.out_norm
        self.out_norm = norm(config=plain, hidden_size=self.value_head_dim, eps=config.layernorm_epsilon)

    def _compute_g_and_beta(
        self, A_log_local_cp: Tensor, dt_bias_local_cp: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        g = -A_log_local_cp.float().exp() * F.softplus(alpha.float() + dt_bias_local_cp.float())
        return g, beta.sigmoid()


def without_fla() -> None:
    """Put torch's functions where Megatron-Core takes those of `fla` from, if that is not there or there is no GPU."""
    if not cpu.needed():
        if common.HAVE_FLA:
            return
        log.warning("fla is not installed: gated delta nets are plain torch, which is right but many times slower")
    common.HAVE_FLA = True
    common.l2norm = delta_rule.l2norm
    gdn.causal_conv1d = delta_rule.causal_conv1d
    gdn.chunk_gated_delta_rule = delta_rule.chunk_gated_delta_rule


def put_delta_nets(spec: Any, config: TransformerConfig, vp_stage: int | None) -> None:
    """Into the layers of a block's spec that `linear_attention_freq` names; `spec` otherwise has attention in all."""
    without_fla()
    if cpu.torch_layers():
        from megatron.core.tensor_parallel import RowParallelLinear

        from megatron_ext.cpu.layers import LayerNormColumnParallelLinear, RMSNorm

        parts = GatedDeltaNetSubmodules(LayerNormColumnParallelLinear, RMSNorm, RowParallelLinear)
    else:
        from megatron.core.extensions.transformer_engine import (
            TELayerNormColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )

        parts = GatedDeltaNetSubmodules(TELayerNormColumnParallelLinear, TENorm, TERowParallelLinear)
    first, pattern = get_transformer_layer_offset(config, vp_stage=vp_stage), config.linear_attention_freq
    assert isinstance(pattern, list)
    layers = []
    for number, layer in enumerate(spec.layer_specs, first):
        if pattern[number]:
            layer = copy.copy(layer)  # layers of one kind are one object
            layer.submodules = dataclasses.replace(
                layer.submodules,
                input_layernorm=IdentityOp,  # fused into in_proj
                self_attention=ModuleSpec(module=DeltaNet, submodules=parts),
            )
        layers.append(layer)
    spec.layer_specs = layers
