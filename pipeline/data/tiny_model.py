"""A random Qwen3-MoE (or dense Qwen3) of about a million parameters as a Hugging Face directory.

The tensors are written under their Hugging Face names without building the model: that needs neither torch nor
transformers' model classes, whose import takes longer than everything here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config.model import TinyModelConfig
from pipeline.data.tokenizer import write_tokenizer


def tensor_shapes(config: TinyModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face name and shape of every weight; linears are [out, in]. Experts are not fused."""
    width, query, key = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, width)
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
    yield "lm_head.weight", (config.vocab_size, width)


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
    return write_tokenizer(directory, config.tokenizer)
