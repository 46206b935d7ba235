"""What a Hugging Face config.json says, and whether such a model is built here. No torch, no Megatron."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen3_moe", "qwen3")


class UnsupportedModel(ValueError):
    """The Hugging Face model is of a family, or has a feature, that is not built here."""


@dataclass(frozen=True)
class ModelShape:
    """What the rest of the package must know of a model.

    vocab_size:        tokens of the Hugging Face model.
    padded_vocab_size: rows of the embedding here, a multiple of the tensor-parallel size.
    topk:              experts a token; 0 for a dense model.
    """

    family: str
    num_layers: int
    num_experts: int
    topk: int
    vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model directory. FileNotFoundError says what is missing."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no Hugging Face model directory: it has no config.json")
    return json.loads(file.read_text())


def model_shape(hf: dict[str, Any], tensor_parallel: int = 1) -> ModelShape:
    """The shape of a supported model. Raises UnsupportedModel with the reason."""
    family = hf.get("model_type", "?")
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    if hf.get("attention_bias"):
        raise UnsupportedModel(f"{family} with attention_bias=true is not built here")
    if hf.get("use_sliding_window"):
        raise UnsupportedModel(f"{family} with use_sliding_window=true is not built here")
    if (rope_settings(hf).get("rope_type") or "default") != "default":
        raise UnsupportedModel(f"rope_type {rope_settings(hf)['rope_type']!r} is not built here; only the default is")
    moe = family == "qwen3_moe"
    if moe and (hf.get("decoder_sparse_step", 1) != 1 or hf.get("mlp_only_layers")):
        raise UnsupportedModel("qwen3_moe with dense layers among the sparse ones is not built here")
    vocab = hf["vocab_size"]
    return ModelShape(
        family=family,
        num_layers=hf["num_hidden_layers"],
        num_experts=num_experts(hf) if moe else 0,
        topk=hf["num_experts_per_tok"] if moe else 0,
        vocab_size=vocab,
        padded_vocab_size=math.ceil(vocab / tensor_parallel) * tensor_parallel,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 nests the rotary settings; earlier files hold them flat."""
    nested = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return {"rope_theta": hf.get("rope_theta", 10000.0), **nested}


def num_experts(hf: dict[str, Any]) -> int:
    """Routed experts a layer of a Hugging Face config, under whichever name its family uses; 0: a dense model."""
    return next((hf[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if hf.get(k)), 0)
