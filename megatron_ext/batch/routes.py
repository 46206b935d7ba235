"""What the routes of a sequence must be for a model. Numpy alone, so that whoever receives routes can check them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Routed(Protocol):
    """What of a model its routes depend on; `hf.description` has it."""

    @property
    def num_layers(self) -> int: ...
    @property
    def topk(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def moe_layers(self) -> Sequence[int]: ...


MISSING = -1
"""In all places of a row: nobody knows which experts ran."""


def route_dtype(num_experts: int) -> np.dtype:
    """The narrowest type that holds every expert id: uint8 up to 256 experts, else int16."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.int16)


def check_routes(routes: np.ndarray, model: Routed) -> None:
    """Raise ValueError where routes [tokens, layers, topk] are not those of a model: another shape, an expert that it
    does not have, or a row that names an expert twice. Rows of dense layers are not read.

    A row of -1 alone is one that is missing: that token routes natively in that layer.
    """
    if routes.shape[1:] != (model.num_layers, model.topk):
        have, want = routes.shape[1:], (model.num_layers, model.topk)
        raise ValueError(f"routes are for {have[0]} layers, top {have[1]}; the model has {want[0]}, top {want[1]}")
    if not routes.size:
        return
    least = routes.min()
    if least < MISSING or routes.max() >= model.num_experts:
        raise ValueError(f"expert ids {least} .. {routes.max()} are outside [0, {model.num_experts})")
    moe_layers = list(model.moe_layers)
    sparse = routes if len(moe_layers) == model.num_layers else routes[:, moe_layers]
    if least == MISSING:
        absent = sparse == MISSING
        partly = absent.any(-1) & ~absent.all(-1)
        if partly.any():
            row, layer = (int(i[0]) for i in partly.nonzero())
            raise ValueError(
                f"a route of layer {moe_layers[layer]} has {MISSING} among its experts for token {row}: a missing row "
                f"is {MISSING} in all places"
            )
    choices = np.ascontiguousarray(np.moveaxis(sparse, -1, 0))  # compared three times as fast as with a stride
    for a in range(model.topk - 1):
        for b in range(a + 1, model.topk):
            same = choices[a] == choices[b]
            if least == MISSING:
                same &= choices[a] != MISSING
            if same.any():
                row, layer = (int(i[0]) for i in same.nonzero())
                raise ValueError(
                    f"a route of layer {moe_layers[layer]} names expert {sparse[row, layer, a]} twice for one token"
                )
