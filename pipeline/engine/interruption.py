"""What happens to the requests that a server runs while its weights change; docs/interruption.md compares the modes.

abort:    they end and return what they have; sessions go on with them afterwards.
drain:    they are waited for.
in_place: they stand still and keep their keys and values, those of the old weights.
retract:  they stand still, and their keys and values are computed again under the new weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.config.run import InterruptMode
from pipeline.engine.membership import FleetServer

HALTS = ("in_place", "retract")
_POLL_S = 0.01


async def stop_requests(server: FleetServer, mode: InterruptMode) -> None:
    """No request of this server gets on when it returns. Nothing may be sent to it meanwhile, but what was sent before
    may still arrive. Raises ServerError where the server fails.

    Aborts are by /abort_request, again and again: SGLang's own pause asks once a second whether something still runs.
    """
    if mode in HALTS:
        await server.client.ask("POST", "/pause_generation", {"mode": mode})
        server.halted = True
        return
    while True:
        if mode == "abort":
            await server.client.ask("POST", "/abort_request", {"abort_all": True})
        if not server.in_flight and await _idle(server):
            return
        await asyncio.sleep(_POLL_S)


async def _idle(server: FleetServer) -> bool:
    loads = await server.client.current_loads()
    return not any(load["num_running_reqs"] or load["num_waiting_reqs"] for load in loads)


async def let_requests_go_on(server: FleetServer) -> None:
    """After `stop_requests`. Raises ServerError where the server fails."""
    if server.halted:
        await server.client.ask("POST", "/continue_generation", {})
        server.halted = False


@dataclass
class Updates:
    """Under which mode each version of the weights came."""

    modes: dict[int, InterruptMode] = field(default_factory=dict)

    def mixed_kv(self, weight_versions: np.ndarray) -> np.ndarray | None:
        """Which tokens of one request were sampled over keys and values of older weights than their own: [M] bool; None
        where none was. weight_versions: [M] int32, never falling.

        Its first token's version is that of its prompt's keys and values. Any update but `in_place` makes all of them
        anew.
        """
        if not len(weight_versions) or weight_versions[0] == weight_versions[-1]:
            return None
        first, last = int(weight_versions[0]), int(weight_versions[-1])
        oldest, of = first, {first: first}
        for version in range(first + 1, last + 1):
            oldest = oldest if self.modes.get(version) == "in_place" else version
            of[version] = oldest
        marks = np.array([of[int(v)] < v for v in weight_versions])
        return marks if marks.any() else None


def must_be_current(weight_versions: np.ndarray, sent_under: int, now: int) -> None:
    """Raise ValueError for tokens of weights that the fleet did not hold while their request was open."""
    if len(weight_versions) and not sent_under <= weight_versions.min() <= weight_versions.max() <= now:
        found: Sequence[int] = np.unique(weight_versions).tolist()
        raise ValueError(f"tokens came from weights {found}, the fleet held {sent_under} to {now} meanwhile")
