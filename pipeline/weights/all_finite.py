"""Weights that are no numbers: no server samples from them, which it would die of, and no later checkpoint has them.

A transfer that brought some ends with their names, before its servers are told to go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_ext.hf.bucket import Bucket
from pipeline.errors import SamerouteError

_NAMED = 5  # tensors in an error


class NotFiniteWeightsError(SamerouteError):
    """Weights that a sender has are not finite; the message names them."""


class FiniteWeights:
    """Looks at what passes, and ends nothing: every rank takes part in a stream to its end. `check` comes behind it."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def passing(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """The same buckets."""
        for bucket in buckets:
            named = [(name, tensor) for name, tensor in bucket if tensor.is_floating_point() and tensor.numel()]
            # a sum is finite only where all of its numbers are: one pass, and one answer a bucket
            if named and not torch.stack([t.sum(dtype=torch.float32) for _, t in named]).isfinite().all():
                self.wrong += [f"{name} ({_wrong(tensor)})" for name, tensor in named if not tensor.isfinite().all()]
            yield bucket

    def check(self) -> None:
        """Raises NotFiniteWeightsError where something has passed that is not finite."""
        if self.wrong:
            more = f" and {len(self.wrong) - _NAMED} more" if len(self.wrong) > _NAMED else ""
            raise NotFiniteWeightsError(
                f"the trainer's weights are not finite: {', '.join(self.wrong[:_NAMED])}{more}. No server samples from "
                "them, and no checkpoint is written; run.max_restarts goes back to the newest one, and train.lr down, "
                "or precision.weights=float32, shows whether the update has made them"
            )


def _wrong(tensor: Tensor) -> str:
    return f"{int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} numbers"
