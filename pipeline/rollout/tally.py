"""What happened to rollouts between two steps: counted as it happens, read as metrics when a step takes its groups."""

from __future__ import annotations

from collections import Counter

from pipeline.rewards import Failures
from pipeline.types import Episode


class Tally:
    """Since the last reading. now: seconds of time.monotonic(), wherever it is asked for."""

    def __init__(self, now: float):
        self._began = self._looked = now
        self._idle = 0.0
        self._clear()

    def _clear(self) -> None:
        self._tokens = self._answers = self._cut = 0
        self._idle_s = 0.0
        self._ended: Counter[str] = Counter()
        self.failures = Failures()

    def answer(self, episode: Episode | None) -> None:
        """One is sampled. None: it was cut before its first token."""
        self._answers += 1
        self._tokens += 0 if episode is None else episode.trained_tokens
        self._cut += episode is None or episode.last.finish_reason == "time"

    def group(self, end: str, failures: Failures) -> None:
        """One is graded. end: "finished", "uninformative", "failed"."""
        self._ended[end] += 1
        self.failures += failures

    def servers(self, serving: int, idle: int, now: float) -> None:
        """So many take requests, and so many of them have none, from now on."""
        self._idle_s += self._idle * (now - self._looked)
        self._idle, self._looked = idle / max(serving, 1), now

    def read(self, now: float) -> tuple[dict[str, float], Failures]:
        """The metrics, and the answers that could not be graded; counting begins anew."""
        self._idle_s += self._idle * (now - self._looked)
        seconds = max(now - self._began, 1e-9)
        metrics = {
            "throughput/rollout_tokens_per_s": self._tokens / seconds,
            "idle/servers": self._idle_s / seconds,
            "rollout/answers": float(self._answers),
            "rollout/answers_cut": float(self._cut),
            "rollout/groups_replaced": float(self._ended["uninformative"] + self._ended["failed"]),
        } | self.failures.metrics()
        failures = self.failures
        self._began = self._looked = now
        self._clear()
        return metrics, failures
