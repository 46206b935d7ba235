"""Llama: the dense model that others are compared with. From 3.1 on its rotary embedding is stretched by wavelength."""

from __future__ import annotations

from collections.abc import Iterator
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
    rope = rope_settings(hf)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']}"


LLAMA = Family(
    (*ENDS, *ATTENTION, *DENSE_MLP),
    _fields,
    unsupported=_unsupported,
    rope_types=("default", "llama3"),
    server_ties=True,
)
