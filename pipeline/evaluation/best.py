"""Which evaluation was best, and whether it is time to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pipeline.config.sources.evaluation import BestConfig


@dataclass
class Best:
    """The highest score so far. value, step: None before the first. since: evaluations that came after it."""

    config: BestConfig
    value: float | None = None
    step: int | None = None
    since: int = 0

    def better(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the score is in these metrics and higher than all before; it is the best from now on."""
        value = metrics.get(self.config.score)
        if value is None:
            return False
        if self.value is not None and value <= self.value:
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` is at its end."""
        return self.config.patience is not None and self.since >= self.config.patience

    def __str__(self) -> str:
        return f"{self.config.score} was highest after step {self.step}: {self.value:.4f}"

    def state(self) -> dict[str, Any]:
        """JSON holds it."""
        return {key: value for key, value in asdict(self).items() if key != "config"} | {"score": self.config.score}

    @classmethod
    def restored(cls, config: BestConfig, state: Mapping[str, Any] | None) -> Self:
        """As it was saved; from the beginning where that was of another score."""
        if not state or state["score"] != config.score:
            return cls(config)
        return cls(config, state["value"], state["step"], state["since"])
