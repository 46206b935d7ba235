"""A random Qwen3-MoE (or dense Qwen3) of about a million parameters as a Hugging Face directory.

The tensors are written under their Hugging Face names without building the model: that needs neither torch nor
transformers' model classes, whose import takes longer than everything here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, special_tokens, write_character_tokenizer


class TinyModelConfig(BaseModel):
    """Shape of a tiny model. The vocabulary is the character tokenizer's 64 ids; embeddings are not tied."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(4, ge=1, description="decoder layers")
    hidden: int = Field(64, ge=8, description="width of the residual stream")
    heads: int = Field(4, ge=1, description="query heads")
    kv_heads: int = Field(2, ge=1, description="key-value heads, each shared by heads / kv_heads query heads")
    head_dim: int = Field(32, ge=2, description="width of a head; even, for the rotary embedding")
    experts: int = Field(8, ge=0, description="experts a layer; 0: a dense Qwen3")
    topk: int = Field(2, ge=1, description="experts a token")
    moe_intermediate: int = Field(128, ge=1, description="inner width of an expert")
    intermediate: int = Field(256, ge=1, description="inner width of the feed-forward of a dense model")
    max_positions: int = Field(4096, ge=1, description="longest sequence, tokens")
    init_std: float = Field(0.1, gt=0, description="standard deviation of every random weight; norms start at 1")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        if self.experts and self.topk > self.experts:
            raise ValueError(f"topk={self.topk} is more than experts={self.experts}; lower topk")
        return self

    def hf_config(self) -> dict[str, Any]:
        """The content of config.json, as transformers 5 writes it."""
        specials = special_tokens()
        config: dict[str, Any] = {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": specials.index(BOS),
            "dtype": "float32",
            "eos_token_id": specials.index(EOS),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": self.init_std,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": specials.index(PAD),
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": VOCAB_SIZE,
        }
        if not self.experts:
            return config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        return config | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.moe_intermediate,
            "norm_topk_prob": True,
            "num_experts": self.experts,
            "num_experts_per_tok": self.topk,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }


def tensor_shapes(config: TinyModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face name and shape of every weight; linears are [out, in]. Experts are not fused."""
    width, query, key = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (VOCAB_SIZE, width)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.self_attn.q_proj.weight", (query, width)
        yield f"{prefix}.self_attn.k_proj.weight", (key, width)
        yield f"{prefix}.self_attn.v_proj.weight", (key, width)
        yield f"{prefix}.self_attn.o_proj.weight", (width, query)
        yield f"{prefix}.self_attn.q_norm.weight", (config.head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (config.head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
        if config.experts:
            yield f"{prefix}.mlp.gate.weight", (config.experts, width)
        inner = config.moe_intermediate if config.experts else config.intermediate
        for mlp in [f"mlp.experts.{e}" for e in range(config.experts)] or ["mlp"]:
            yield f"{prefix}.{mlp}.gate_proj.weight", (inner, width)
            yield f"{prefix}.{mlp}.up_proj.weight", (inner, width)
            yield f"{prefix}.{mlp}.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (VOCAB_SIZE, width)


def parameter_count(config: TinyModelConfig) -> int:
    """Weights in the model."""
    return sum(int(np.prod(shape)) for _, shape in tensor_shapes(config))


def make_tiny_model(directory: str | Path, config: TinyModelConfig, seed: int) -> Path:
    """Write config.json, generation_config.json, model.safetensors (fp32) and the tokenizer; returns the directory.

    The same config and seed give the same bytes. Files of these names that are already there are replaced.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {
        # The only vectors are the weights of norms.
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, dtype=np.float32) * np.float32(config.init_std)
        for name, shape in tensor_shapes(config)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf = config.hf_config()
    generation = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}, indent=2) + "\n")
    return write_character_tokenizer(directory)
