"""Which server gets the next request: the one that works on its group, then the one with the fewest; but no server
that queues, or whose memory for keys and values is nearly full, while another has room.

A server's last word is up to a second old. What has been sent to it and has ended since is known exactly, so its room
is counted on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engine.membership import FleetServer

_NEARLY_FULL = 0.9  # of the tokens that its KV cache holds: what runs goes on growing


@dataclass(frozen=True)
class Load:
    """What a server said of itself.

    waiting: requests in its queue. kv_used: share of its KV cache that running requests hold.
    room: so many requests more will not have to wait; negative: so many must end before.
    in_flight: requests that this process had open there when it was asked.
    """

    waiting: int
    kv_used: float
    room: int
    in_flight: int

    @classmethod
    def of(cls, loads: Sequence[dict[str, Any]], in_flight: int) -> Load:
        """loads: of its schedulers, as /v1/loads has them."""
        waiting = sum(load["num_waiting_reqs"] for load in loads)
        used = max((load["num_used_tokens"] / max(1, load["max_total_num_tokens"]) for load in loads), default=0.0)
        return cls(waiting, used, -waiting if waiting else sum(map(_room, loads)), in_flight)

    def full(self, in_flight: int) -> bool:
        """Whether one request more would wait, now that this process has so many open there."""
        return in_flight - self.in_flight >= self.room


def _room(load: dict[str, Any]) -> int:
    """Of a scheduler whose queue is empty."""
    running, free = load["num_running_reqs"], _NEARLY_FULL * load["max_total_num_tokens"] - load["num_used_tokens"]
    room = load["max_running_requests"] - running
    if not running:
        return room
    return max(0, min(room, int(free * running / max(1, load["num_used_tokens"]))))  # each as long as those that run


class Pressure:
    """What the servers said last, and what came of it.

    moved: requests that did not go where their group is, for that server was full. queued: those that went to a full
    server, for all were.
    """

    def __init__(self):
        self.moved = self.queued = 0
        self._loads: dict[FleetServer, Load] = {}
        self._most = (0, 0.0)

    def hear(self, loads: dict[FleetServer, Load]) -> None:
        """The last words of all servers that have said something."""
        self._loads = loads
        self._most = max(self._most[0], self._waiting), max(self._most[1], self._kv_used)

    def choose(self, servers: Sequence[FleetServer], group: object) -> FleetServer:
        """Who gets the next request, of servers that take them, at least one."""
        loads = self._loads
        full = {server: server in loads and loads[server].full(server.in_flight) for server in servers}
        chosen = min(servers, key=lambda server: (full[server], not server.groups[group], server.in_flight))
        self.queued += full[chosen]
        self.moved += not full[chosen] and not chosen.groups[group] and any(s.groups[group] for s in servers)
        return chosen

    def metrics(self) -> dict[str, float]:
        """Counts since the run began; waiting and kv_used are the most since the last call, of any moment."""
        (waiting, kv_used), self._most = self._most, (self._waiting, self._kv_used)
        return {
            "servers/requests_moved": float(self.moved),
            "servers/requests_queued": float(self.queued),
            "servers/waiting": float(waiting),
            "servers/kv_used": kv_used,
        }

    @property
    def _waiting(self) -> int:
        return sum(load.waiting for load in self._loads.values())

    @property
    def _kv_used(self) -> float:
        return max((load.kv_used for load in self._loads.values()), default=0.0)
