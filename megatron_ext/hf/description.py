"""What a Hugging Face config.json says, and whether such a model is built here. No Megatron."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UnsupportedModel(ValueError):
    """The Hugging Face model is of a family, or has a feature, that is not built here."""


@dataclass(frozen=True)
class ModelShape:
    """What the rest of the package must know of a model.

    moe_layers:        layers with a router, counted from 0; the others are dense.
    topk:              experts a token; 0 for a dense model.
    vocab_size:        tokens of the Hugging Face model.
    padded_vocab_size: rows of the embedding here, a multiple of the tensor-parallel size.
    """

    family: str
    num_layers: int
    moe_layers: tuple[int, ...]
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
    """The shape of a supported model. Raises UnsupportedModel with all reasons."""
    from megatron_ext.hf.families import FAMILIES  # families read this file

    name = hf.get("model_type", "?")
    if name not in FAMILIES:
        raise UnsupportedModel(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    reasons = list(family.unsupported(hf))
    if (rope := rope_settings(hf)["rope_type"]) not in family.rope_types:
        reasons.append(f"rope_type {rope!r}")
    if hf.get("use_sliding_window"):
        reasons.append("use_sliding_window=true")
    if hf.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act {hf['hidden_act']!r}")
    if (quantized := hf.get("quantization_config")) and quantized.get("quant_method") not in family.quantization:
        reasons.append("quantized weights (write the model in bfloat16 first)")
    if reasons:
        raise UnsupportedModel(f"{name} with {'; with '.join(reasons)} is not built here")
    moe_layers, vocab = tuple(family.moe_layers(hf)), hf["vocab_size"]
    return ModelShape(
        family=name,
        num_layers=hf["num_hidden_layers"],
        moe_layers=moe_layers,
        num_experts=num_experts(hf) if moe_layers else 0,
        topk=hf["num_experts_per_tok"] if moe_layers else 0,
        vocab_size=vocab,
        padded_vocab_size=math.ceil(vocab / tensor_parallel) * tensor_parallel,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_type and what the type needs. transformers 5 nests them; earlier files hold them flat, or call
    the type `type`."""
    nested = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    nested["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    flat = {k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if hf.get(k) is not None}
    return {"rope_theta": 10000.0} | flat | nested


def num_experts(hf: dict[str, Any]) -> int:
    """Routed experts a layer of a Hugging Face config, under whichever name its family uses; 0: a dense model."""
    return next((hf[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if hf.get(k)), 0)


def draft_tensors(hf: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Which tensor names belong to multi-token-prediction layers.

    They stand behind the model's own layers, draft tokens for speculative decoding, and are no part of the policy:
    they are left out, by name and in the log, and the config of an exported model says that it has none.
    """
    count, first = hf.get("num_nextn_predict_layers") or 0, hf["num_hidden_layers"]
    hit = re.compile(r"model\.layers\.(\d+)\.")
    return sorted(n for n in names if (m := hit.match(n)) and first <= int(m[1]) < first + count)
