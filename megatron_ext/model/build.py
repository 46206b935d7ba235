"""A Hugging Face config becomes Megatron-Core model chunks.

config.json -> TransformerConfig -> layer spec (Transformer Engine's, or the same shape in plain torch) -> GPTModel
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megatron_ext import cpu
from megatron_ext.config import ParallelConfig, TrainerConfig, TrainerPrecision
from megatron_ext.hf.description import ModelDescription
from megatron_ext.mcore import (
    GPTModel,
    MLASelfAttention,
    MLATransformerConfig,
    MoESubmodules,
    TransformerConfig,
    gather_from_sequence_parallel_region,
    get_gpt_decoder_block_spec,
    parallel_state,
    quick_gelu,
    set_tensor_model_parallel_attributes,
)
from megatron_ext.model.all_heads_norm import AllHeadsNorm
from megatron_ext.model.biased_router import BiasedRouter
from megatron_ext.model.latent_attention import LatentAttention
from megatron_ext.model.llama3_rope import stretch
from megatron_ext.model.top_one import TopOneRouter, mlp_submodules
from megatron_ext.model.yarn import YarnTransformerConfig

_ACTIVATIONS = {"silu": F.silu, "quick_gelu": quick_gelu}


def transformer_config(
    model: ModelDescription,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    precision: TrainerPrecision,
    *,
    replay: bool,
) -> TransformerConfig:
    """Megatron-Core's config for a model. `replay` gives each router its RouterReplay.

    Raises ValueError where Megatron-Core cannot train such a model in this layout.
    """
    fields = (
        _shape_fields(model) | _layout_fields(parallel) | _dtype_fields(precision) | _kernel_fields()
    )  # fmt: skip
    if model.num_experts:
        fields |= _moe_fields(model, trainer, precision, replay=replay)
    fields |= _recompute_fields(model, trainer) | model.fields
    kind, of_kind = _kind(fields)
    if cpu.needed() and fields["activation_func"] == "silu":
        fields["bias_activation_fusion"] = fields.get("activation_func_clamp_value") is None  # see `cpu.row_functions`
    fields |= of_kind | {"activation_func": _ACTIVATIONS[fields["activation_func"]]} | trainer.extra
    later: dict[str, Any] = {}  # what Megatron-Core's config refuses, and its model computes rightly
    if model.num_experts and fields["add_bias_linear"]:
        if not cpu.torch_layers() and fields["expert_tensor_parallel_size"] > 1:
            raise ValueError(
                "Transformer Engine's experts would add their output bias on every expert-tensor rank; set "
                "parallel.expert_tensor=1"
            )
        # no biased experts with expert tensor parallelism; `torch_experts.py` adds the bias once
        later["add_bias_linear"], fields["add_bias_linear"] = True, False
    if model.topk == 1 and fields.get("moe_router_pre_softmax") is False:
        # no softmax over a single chosen expert, whose weight is 1 and leaves its router without a gradient
        later["moe_router_pre_softmax"], fields["moe_router_pre_softmax"] = False, True
    config = kind(**fields)
    for name, value in later.items():
        setattr(config, name, value)
    return config


def _shape_fields(model: ModelDescription) -> dict[str, Any]:
    """What the families have in common, unless a family's own fields say otherwise."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.hf["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _layout_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """How the ranks divide it."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "variable_seq_lengths": True,  # packed micro-batches differ in length
        "moe_token_dispatcher_type": "alltoall",  # the only one that takes variable lengths; checked for dense too
        "calculate_per_token_loss": True,  # the three-tuple loss; the two-tuple form is multiplied by the CP size
        # batch_p2p_comm with interleaved stages and no overlap gives wrong gradients, silently (0.19.2)
        "batch_p2p_comm": parallel.virtual_pipeline is None,
        "overlap_p2p_comm": parallel.virtual_pipeline is not None,
        "deallocate_pipeline_outputs": True,
    }


def _dtype_fields(precision: TrainerPrecision) -> dict[str, Any]:
    """Of weights and activations."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision.weights]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision.weights == "bfloat16",
        "attention_softmax_in_fp32": True,
    }


def _kernel_fields() -> dict[str, Any]:
    """Fused kernels, which are Transformer Engine's or go with them."""
    fused = not cpu.torch_layers()
    return {
        "use_cpu_initialization": cpu.needed(),
        "persist_layer_norm": fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": fused,
        "apply_rope_fusion": fused,
        "gradient_accumulation_fusion": False,  # needs apex
    }


def _recompute_fields(model: ModelDescription, trainer: TrainerConfig) -> dict[str, Any]:
    """Activations that backward computes again."""
    if trainer.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if trainer.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": ["moe"] if model.num_experts else ["mlp"],
        }
    return {}


def _kind(fields: dict[str, Any]) -> tuple[type[TransformerConfig], dict[str, Any]]:
    """The class of config that takes such fields, and what goes with it."""
    if fields.get("multi_latent_attention"):
        # The kernel (0.19.2) knows no other rotation, and counts channels in powers of two.
        channels = (fields["qk_head_dim"], fields["qk_pos_emb_head_dim"], fields["v_head_dim"])
        fused = fields["rope_type"] == "yarn" and all(n & (n - 1) == 0 for n in channels)
        return MLATransformerConfig, {"apply_rope_fusion": fused and not cpu.torch_layers()}
    if "yarn_rotary_scaling_factor" in fields:
        return YarnTransformerConfig, {"apply_rope_fusion": False}  # the kernel leaves out YaRN's scale
    return TransformerConfig, {}


def _moe_fields(
    model: ModelDescription, trainer: TrainerConfig, precision: TrainerPrecision, *, replay: bool
) -> dict[str, Any]:
    """What every mixture of experts has."""
    sparse = [int(layer in model.moe_layers) for layer in range(model.num_layers)]
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.topk,
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32" if precision.router == "fp32" else None,  # None: that of the activations
        "moe_router_fusion": trainer.router_fusion,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": not cpu.torch_layers(),
        "moe_enable_routing_replay": replay,
    }


def layer_spec(
    config: TransformerConfig, vp_stage: int | None, *, weight_of_one: bool = False, norm_over_heads: bool = False
):
    """Transformer Engine's block spec on a GPU; without one or without it, plain torch under the same parameter names.

    weight_of_one, norm_over_heads: see ModelDescription. Raises ValueError for attention sinks on a GPU without
    Transformer Engine.
    """
    plain = cpu.torch_layers()
    if plain and not cpu.needed() and config.softmax_type == "learnable":
        raise ValueError(
            "attention sinks are computed by Transformer Engine, or on a CPU; install transformer-engine, or set "
            "device=cpu"
        )
    as_attention = copy.copy(config)
    as_attention.experimental_attention_variant = None  # the spec of such layers is made for Transformer Engine alone
    spec = get_gpt_decoder_block_spec(
        as_attention, use_transformer_engine=not plain, normalization="RMSNorm", vp_stage=vp_stage
    )
    for layer in spec.layer_specs or []:
        if layer.submodules.self_attention.module is MLASelfAttention:
            layer.submodules.self_attention.module = LatentAttention
        if isinstance(moe := mlp_submodules(layer.submodules.mlp), MoESubmodules):
            if weight_of_one:
                moe.router = TopOneRouter
            elif config.add_bias_linear:
                moe.router = BiasedRouter
    if plain:
        from megatron_ext.model.torch_spec import without_transformer_engine

        without_transformer_engine(spec)
    if config.experimental_attention_variant == "gated_delta_net":
        from megatron_ext.model.gated_delta_net import put_delta_nets

        put_delta_nets(spec, config, vp_stage)
    if norm_over_heads:
        for layer in spec.layer_specs or []:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = functools.partial(AllHeadsNorm, heads=config.num_attention_heads)
            attention.k_layernorm = functools.partial(AllHeadsNorm, heads=config.num_query_groups)
    return spec


class ValueHead(torch.nn.Linear):
    """One number a token in the LM head's place, the same on every tensor-parallel rank; it starts at 0.

    [tokens / sp, rows, hidden] -> [tokens, rows, 1] float32. Every rank computes the same loss from the gathered
    values, so the gradient of its own part is just that part.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        torch.nn.init.zeros_(self.weight)
        self.sequence_parallel = config.sequence_parallel
        self.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over the ranks

    def forward(self, input_, weight=None, runtime_gather_output=None):
        values = super().forward(input_).float()
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def build_model(
    model: ModelDescription,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    precision: TrainerPrecision,
    *,
    head: Literal["lm", "value"] = "lm",
    replay: bool,
) -> tuple[TransformerConfig, list[GPTModel]]:
    """This rank's model chunks: one, or `virtual_pipeline` of them. Process groups must exist.

    head: "value" puts a ValueHead where the LM head would be.
    Raises UnsupportedModel, or ValueError where the model does not divide into the layout.
    """
    parallel.check_model(model)
    rope = model.rope
    config = transformer_config(model, parallel, trainer, precision, replay=replay)
    chunks = []
    for chunk in range(parallel.virtual_pipeline or 1):
        stage = chunk if parallel.virtual_pipeline else None
        built = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(
                config, stage, weight_of_one=model.weight_of_one, norm_over_heads=model.norm_over_heads
            ),
            vocab_size=model.padded_vocab_size(parallel.tensor),
            max_sequence_length=model.hf["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=model.tied_embeddings and head == "lm",
            position_embedding_type="yarn" if isinstance(config, YarnTransformerConfig) else "rope",
            rotary_percent=rope.get("partial_rotary_factor", 1.0),
            rotary_base=rope["rope_theta"],
            vp_stage=stage,
        )
        if rope["rope_type"] == "llama3":
            stretch(built.rotary_pos_emb, rope)
        if head == "value" and built.post_process:
            built.output_layer = ValueHead(config)
        for name, parameter in built.named_parameters():
            if name.endswith("softmax_offset"):  # Megatron-Core tells no optimizer that ranks hold different sinks
                set_tensor_model_parallel_attributes(parameter, parallel.tensor > 1, 0, 1)
                parameter.data = parameter.data.to(config.params_dtype)  # Transformer Engine makes them float32
        chunks.append(built if cpu.needed() else built.cuda())
    return config, chunks
