"""A run whose engines failed begins again from its last checkpoint, so often and no oftener."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.cluster.placement import PlacementError
from pipeline.cluster.ray_session import RayError
from pipeline.engine.server import ServerError
from pipeline.errors import SamerouteError
from pipeline.restart_budget import RestartBudget
from pipeline.stored import StoredRoutesLostError
from pipeline.trainer.spikes import SpikesError
from pipeline.trainer.waits import RankDiedError, TrainerError

_ENGINE_FAILURES = (TrainerError, ServerError, PlacementError, RayError, StoredRoutesLostError, SpikesError)


def engine_failed(error: SamerouteError) -> bool:
    """Whether another attempt may not meet it again: a process that died or hung, a node that was lost, also where that
    is why something else, a checkpoint, could not be had; or updates that other prompts may not spoil."""
    return isinstance(error, _ENGINE_FAILURES) or isinstance(error.__cause__, RankDiedError)


class RestartLimitError(SamerouteError):
    """The run fails again and again; the message ends with the last failure."""


class Restarts:
    """How often a run has begun again. most, within_s: so many restarts in so many seconds are allowed; 0: none."""

    def __init__(self, most: int, within_s: float, clock: Callable[[], float] = time.monotonic):
        self._budget, self.count = RestartBudget(most, within_s, clock), 0

    def again(self, failure: SamerouteError) -> str:
        """The run failed and could begin again: the words for its user where it may.

        Raises the failure where no restarts are asked for, RestartLimitError where there have been too many of late.
        """
        budget = self._budget
        if not budget.most:
            raise failure
        if not budget.take():
            raise RestartLimitError(
                f"the run was begun again {budget.most} times within {budget.within_s / 60:g} minutes "
                f"(run.max_restarts, run.restart_window_minutes) and failed again: {failure}"
            ) from failure
        self.count += 1
        return f"restart {budget.taken} of {budget.most} within {budget.within_s / 60:g} minutes"
