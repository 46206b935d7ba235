"""What a run uses and what of it stands idle, in device-hours: of GPUs, or of processes where there are none.

    device-hours = devices x hours of the steps         devices: trainer ranks, and the GPUs of the servers
    idle         = those in which a trainer rank, or a server, had nothing to do

Sampling and training in turn, servers idle while the trainer works, and the trainer while they do. Beside each other,
both tell themselves (`idle/trainer`, `idle/servers`).
"""

from __future__ import annotations

from collections.abc import Mapping


class DeviceHours:
    """Sums since the run, or its resumption, began. ranks, servers: devices of each kind. price: of a device and an
    hour; None: costs are not told. shared: the devices of the one are those of the other, by turns."""

    def __init__(self, ranks: int, servers: int, price: float | None = None, *, shared: bool = False):
        self.ranks, self.servers, self.price, self.shared = ranks, servers, price, shared
        self.hours = self.idle = 0.0

    def step(self, metrics: Mapping[str, float], sampled: int) -> dict[str, float]:
        """A step's metrics, from its seconds. sampled: tokens that it trains on; nothing where it took no time."""
        step_s = metrics.get("time/step_s", 0.0)
        if not step_s:
            return {}
        trainer, servers = self._idle(metrics, step_s)
        devices, hours = self.ranks + self.servers, step_s / 3600
        idle = self.ranks * trainer + self.servers * servers
        if self.shared:  # each is busy in both turns
            devices = max(self.ranks, self.servers)
            idle = devices * (1.0 - _share(metrics, step_s, "rollout", "train", "check", "sync"))
        self.hours += devices * hours
        self.idle += idle * hours
        out = {
            "devices/hours": self.hours,
            "devices/idle_hours": self.idle,
            "devices/tokens_per_hour": sampled / (devices * hours),
            "devices/trainer_idle": trainer,
            "devices/tokens_per_trainer_hour": sampled / (self.ranks * hours),
        }
        if self.servers:
            out["devices/servers_idle"] = servers
            out["devices/tokens_per_server_hour"] = sampled / (self.servers * hours)
        if self.price is not None:
            out["devices/cost"] = self.price * self.hours
            out["devices/cost_per_million_tokens"] = 1e6 * self.price * devices * hours / max(1, sampled)
        return out

    def _idle(self, metrics: Mapping[str, float], step_s: float) -> tuple[float, float]:
        """Shares of a step in which the trainer, and the servers, have nothing to do."""
        trainer = metrics.get("idle/trainer", 1.0 - _share(metrics, step_s, "train", "check", "sync"))
        servers = metrics.get("idle/servers", 1.0 - _share(metrics, step_s, "rollout", "sync"))
        return trainer, servers if self.servers else 0.0


def _share(metrics: Mapping[str, float], step_s: float, *phases: str) -> float:
    """Of a step's seconds, those of these phases."""
    return min(1.0, sum(metrics.get(f"time/{phase}_s", 0.0) for phase in phases) / step_s)
