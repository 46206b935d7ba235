"""A tiny random model of each family, made with transformers, and what transformers computes with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, VOCAB = 4, 509  # an odd vocabulary: the last shard of an embedding is padded

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe with dense layers": (
        "qwen3_moe",
        {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [2]},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 8, "intermediate_size": 64, "tie_word_embeddings": True}),
    "deepseek_v3": (
        "deepseek_v3",
        _DEEPSEEK
        | {"q_lora_rank": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "rope_parameters": _YARN},
    ),
    "moonlight": ("deepseek_v3", _DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v32": (
        "deepseek_v32",
        _DEEPSEEK
        | {"q_lora_rank": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "rope_parameters": _YARN}
        | {"index_topk": 32, "index_n_heads": 4, "index_head_dim": 16},
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {name: value for name, value in _DEEPSEEK.items() if name != "first_k_dense_replace"}
        | {"q_lora_rank": 32, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-6},
    ),
    "minimax_m2": (
        "minimax_m2",
        {"head_dim": 32, "num_local_experts": 8, "intermediate_size": 64, "rotary_dim": 16},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "sliding_window": 5,
            "swiglu_limit": 0.5,
            "rope_parameters": {k: v for k, v in _YARN.items() if "mscale" not in k} | {"truncate": False},
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "head_dim": 32,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 8,
            "full_attention_interval": 2,
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            "head_dim": 32,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "initializer_range": 0.05,  # three delta nets in a row let roundings grow
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.25,  # not Llama 3.1's own three numbers, which Megatron-Core has as its defaults
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 40,
}
"""Of the wavelengths of a head of 16, one stays as it is, one falls in between, and six are stretched."""
DENSE_FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama, untied": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def _settings(name: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    """model_type and all arguments of a config."""
    model_type, settings = (FAMILIES | DENSE_FAMILIES)[name]
    common = {k: v for k, v in _COMMON.items() if name in FAMILIES or k != "num_experts_per_tok"}
    return model_type, common | settings | changes


def tiny_config(name: str) -> dict[str, Any]:
    """config.json of one."""
    from transformers import AutoConfig

    model_type, settings = _settings(name)
    return AutoConfig.for_model(model_type, **settings).to_dict()


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """A random model in float32, with `changes` in its config.json. Norms, biases and routing biases, which
    transformers sets to 1 and 0, are random; the last so little that every expert is chosen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = _settings(name, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 or name.endswith("_bias"):
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.03)
    model.save_pretrained(folder)
    return folder


def transformers_says(folder: Path, samples: Sequence) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log-probs of all response tokens, one sample after another, and routes: [input tokens, layers, topk] a sample,
    zeros where a layer is dense, as SGLang returns them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen: dict[int, np.ndarray] = {}

    def record(layer: int):
        def hook(router, inputs, output):
            chosen[layer] = output[2][:-1].numpy()

        return hook

    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(record(int(name.split(".")[2])))
    logprobs, routes = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.no_grad():
            scores = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        logprobs.append(scores[:-1].gather(1, ids[1:, None])[sample.prompt_length - 1 :, 0].numpy())
        rows = np.zeros((len(ids) - 1, LAYERS, getattr(model.config, "num_experts_per_tok", 0)), np.uint8)
        for layer, selection in chosen.items():
            rows[:, layer] = selection
        routes.append(rows)
    return np.concatenate(logprobs), routes
