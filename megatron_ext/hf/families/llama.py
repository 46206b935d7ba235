"""Llama: the dense model that others are compared with. From 3.1 on its rotary embedding is stretched by wavelength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ext.hf.config_json import rope_settings
from megatron_ext.hf.families.family import Family, HFConfig
from megatron_ext.hf.tables import ATTENTION, DENSE_MLP, ENDS


def _fields(hf: HFConfig) -> dict[str, Any]:
    return {}


def _unsupported(hf: HFConfig) -> Iterator[str]:
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            yield f"{name}=true"


def _server_alone(hf: HFConfig) -> Mapping[str, Any]:
    """SGLang 0.5.23, models/llama.py:329 and 335 to 341."""
    stretched = rope_settings(hf).get("original_max_position_embeddings")
    return {"bias": False, "rope_is_neox_style": True} | (
        {"original_max_position_embeddings": stretched} if stretched is not None else {}
    )


LLAMA = Family(
    (*ENDS, *ATTENTION, *DENSE_MLP),
    _fields,
    unsupported=_unsupported,
    rope_types=("default", "llama3"),
    server_ties=True,
    server_alone=_server_alone,
)
