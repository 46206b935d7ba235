"""The sentence that says where the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.parts import NotFinite


def where_not_finite(found: Sequence[Sequence[NotFinite]]) -> str:
    """found: of every rank, its weights that are not finite and its first output that is not."""
    outputs = [
        (one.depth, one.order, rank, one) for rank, own in enumerate(found) for one in own if one.kind == "output"
    ]
    weights = list({one.name: one for own in found for one in own if one.kind == "weight"}.values())
    bad = ""
    if weights:
        more = f" and {len(weights) - 8} more" if len(weights) > 8 else ""
        bad = f"Weights that are not finite: {', '.join(map(str, weights[:8]))}{more}."
    if not outputs:
        return (
            f"{bad} All outputs of the forward pass are finite: no token met them."
            if weights
            else "All weights and all outputs of the forward pass are finite: look at the loss, and at backward."
        )
    _, _, rank, first = min(outputs, key=lambda found: found[:3])
    where = "" if first.layer is None else f", layer {first.layer}"
    where += "" if first.expert is None else f", expert {first.expert}"
    cause = bad or "All weights are finite: its inputs are too large, or it computes wrongly."
    return f"The first output that is not finite is made by trainer rank {rank}{where}: {first}. {cause}"
