"""Which updates are not made: those whose gradient is far larger than the last ones'."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from pipeline.config.run import TrainConfig
from pipeline.errors import SamerouteError

LAST, LEAST = 50, 5
"""Updates with a gradient that the median is over, and those that it needs."""


class SpikesError(SamerouteError):
    """Updates are skipped step after step. step: the last of them."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class GradientSpikes:
    """Of a run. One limit goes to all ranks with an update, so that all make it or none does.

    in_a_row: steps, up to the last, in which an update was skipped. said: of the last step, what was skipped and why.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.in_a_row, self.said = config, 0, ""
        self._norms: deque[float] = deque(maxlen=LAST)

    @property
    def limit(self) -> float:
        """Largest gradient norm, before clipping, with which an update is made."""
        config = self.config
        limit = math.inf if config.skip_grad_norm_above is None else config.skip_grad_norm_above
        if config.skip_grad_norm_times is not None and len(self._norms) >= LEAST:
            limit = min(limit, config.skip_grad_norm_times * median(self._norms))
        return limit

    def took(self, metrics: Mapping[str, float]) -> None:
        """An update, as `merge_update` tells of it. A norm that was skipped does not move the median, nor does one of
        0: where most batches teach nothing, those that do would all be spikes."""
        norm, limit = metrics["train/grad_norm"], self.limit
        if not metrics.get("train/skipped_updates"):
            self._norms.extend([norm] if norm > 0 else [])
        elif math.isfinite(limit) and norm > limit:
            usual = f", the median of the last {len(self._norms)} is {median(self._norms):.3g}" if self._norms else ""
            self.said = f"its gradient norm, {norm:.3g}, is above {limit:.3g}{usual}"
        else:
            self.said = "its gradient is not finite"

    def check(self, step: int, most: int | None) -> None:
        """Raise SpikesError where `most` steps in a row had a skipped update; None: any number may."""
        if most is not None and self.in_a_row >= most:
            raise SpikesError(
                f"{self.in_a_row} steps in a row, up to step {step}, had a skipped update (run.rollback_after={most})",
                step,
            )

    def ended(self) -> str:
        """A step is over: why an update of it was skipped, or nothing."""
        said, self.said = self.said, ""
        self.in_a_row = self.in_a_row + 1 if said else 0
        return said
