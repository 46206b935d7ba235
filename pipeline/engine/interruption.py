"""What happens to the requests that a server runs while its weights change; docs/interruption.md compares the modes.

abort:    they end and return what they have; sessions go on with them afterwards.
drain:    they are waited for.
in_place: they stand still and keep their keys and values, those of the old weights.
retract:  they stand still, and their keys and values are computed again under the new weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.config.run import InterruptMode
from pipeline.engine.membership import FleetServer
from pipeline.engine.sampling import OnTokens, Piece, Sampling
from pipeline.types import Sampled

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


def given_up() -> bool:
    """Whether the task that asks is to end, and not only something that it waits for."""
    own = asyncio.current_task()
    return own is not None and own.cancelling() > 0


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


class Told:
    """What somebody has been told already of an answer, token by token, from which another server goes on where its own
    is lost. It computes the routes of these tokens anew, with the same weights; under other weights the answer begins
    again."""

    def __init__(self, token_ids: Sequence[int] | np.ndarray, sampling: Sampling):
        self._before, self._sampling = token_ids, sampling
        self._version = -1
        self._pieces: list[Piece] = []
        self._known = np.empty(0, np.int32), np.empty(0, np.float32)

    def left(self, version: int) -> tuple[Sequence[int] | np.ndarray, Sampling]:
        """Tokens and sampling of what a server that holds these weights is asked for now."""
        ids = [token for piece in self._pieces for token in piece.ids]
        left = self._sampling.max_new_tokens - len(ids)
        if version != self._version or left < 1 or (self._pieces and self._pieces[-1].ended):
            self._version, self._pieces, ids = version, [], []
        logprobs = [value for piece in self._pieces for value in piece.logprobs]
        self._known = np.array(ids, np.int32), np.array(logprobs, np.float32)
        if not ids:
            return self._before, self._sampling
        return np.concatenate([self._before, self._known[0]]), replace(self._sampling, max_new_tokens=left)

    def hear(self, on_tokens: OnTokens) -> OnTokens:
        """Of what is asked for; on_tokens hears it too."""
        if not self._sampling.each_token or self._sampling.return_kept:  # kept sets are not in pieces
            return on_tokens

        def both(piece: Piece) -> None:
            self._pieces.append(piece)
            on_tokens(piece)

        return both

    def whole(self, part: Sampled) -> Sampled:
        """The whole answer. part: what came last."""
        ids, logprobs = self._known
        if not len(ids) or not len(part.ids):
            return part
        return replace(
            part,
            ids=np.concatenate([ids, part.ids]),
            logprobs=np.concatenate([logprobs, part.logprobs]),
            weight_versions=np.concatenate([np.full(len(ids), self._version, np.int32), part.weight_versions]),
        )
