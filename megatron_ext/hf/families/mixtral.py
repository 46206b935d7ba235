"""Mixtral: every layer sparse, no shared expert, names of its own for the experts' projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_ext.hf.families.family import Family, HFConfig, own_rope_theta
from megatron_ext.hf.tables import ATTENTION, ENDS, HF_LAYER, LAYER, MOE_NORM, Row, gated_mlp
from megatron_ext.hf.transforms import Replicated

_MOE = HF_LAYER + "block_sparse_moe."


def _fields(hf: HFConfig) -> dict[str, Any]:
    own_rope_theta(hf)
    return {"moe_ffn_hidden_size": hf["intermediate_size"], "moe_router_pre_softmax": False}


def _unsupported(hf: HFConfig) -> Iterator[str]:
    if hf.get("sliding_window") is not None:
        yield "sliding_window"


MIXTRAL = Family(
    (
        *ENDS,
        *ATTENTION,
        MOE_NORM,
        Row(LAYER + "mlp.router.weight", (_MOE + "gate.weight",), Replicated()),
        *gated_mlp(LAYER + "mlp.experts.", _MOE + "experts.{expert}.", ("w1", "w3", "w2")),
    ),
    _fields,
    moe_layers=lambda hf: range(hf["num_hidden_layers"]),
    unsupported=_unsupported,
)
