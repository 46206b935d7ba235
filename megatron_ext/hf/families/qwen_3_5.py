"""The text model of Qwen3.5-MoE: Qwen3-Next with its delta nets' projections in four tensors, and every layer sparse.

Its rotary embedding may have sections for the axes of pictures (`mrope_section`), which are one for text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ext.hf.families.family import HFConfig
from megatron_ext.hf.families.qwen_next import HF_NET, QWEN3_NEXT
from megatron_ext.hf.tables import Row
from megatron_ext.hf.transforms import SplitDeltaProjection

_PROJECTIONS = tuple(HF_NET + f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))


def _fields(hf: HFConfig) -> dict[str, Any]:
    return QWEN3_NEXT.fields(hf | {"norm_topk_prob": True})  # transformers asks no field


def _unsupported(hf: HFConfig) -> Iterator[str]:
    yield from QWEN3_NEXT.unsupported(hf)
    if not hf.get("norm_topk_prob", True):
        yield "norm_topk_prob=false"
    if hf.get("mlp_only_layers"):
        yield f"mlp_only_layers={hf['mlp_only_layers']}"


QWEN3_5_MOE_TEXT = replace(
    QWEN3_NEXT,
    table=tuple(
        Row(row.megatron, _PROJECTIONS, SplitDeltaProjection()) if row.megatron.endswith("in_proj.weight") else row
        for row in QWEN3_NEXT.table
    ),
    fields=_fields,
    moe_layers=lambda hf: range(hf["num_hidden_layers"]),
    unsupported=_unsupported,
    without=("intermediate_size",),
    server_ties=True,
    server_alone=lambda hf: {"is_causal": True},  # SGLang 0.5.23, models/qwen3_5.py:1363
)
