"""How often each prompt was solved, and which prompts are asked again because of it.

A visit is one group of answers. Its pass rate is the share of answers with a reward of at least `passing_reward`. What
is kept of a prompt is the mean over its visits in which each newer one counts as much as all before it (the policy
changes, so old visits say little), and for how many visits in a row every answer has passed.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from pipeline.config.sources import CurriculumConfig

_NEWEST = 0.5
"""Weight of the newest visit."""
_TOLERANCE = 1e-6  # of a reward that was added up from parts
_SEEN = np.dtype([("row", "<i8"), ("rate", "<f4"), ("visits", "<i4"), ("solved", "<i4")])


class PassRates:
    """Of the rows of one table, by their number."""

    def __init__(self, config: CurriculumConfig, rows: int, seed: int):
        """rows: of the table. seed: decides which prompts outside the band are asked all the same."""
        self.config, self.seed = config, seed
        self.rate = np.zeros(rows, np.float32)
        self.visits, self.solved = np.zeros(rows, np.int32), np.zeros(rows, np.int32)

    def learn(self, row: int, rewards: Sequence[float] | np.ndarray) -> None:
        """A visit. rewards: of the answers that have one; without any nothing is learned."""
        if not len(rewards):
            return
        passed = pass_rate(rewards, self.config)
        newest = 1.0 if not self.visits[row] else _NEWEST
        self.rate[row] += newest * (passed - self.rate[row])
        self.visits[row] += 1
        self.solved[row] = self.solved[row] + 1 if passed == 1 else 0

    def asks(self, row: int, epoch: int) -> bool:
        """Whether a prompt is asked in this epoch; one that was never visited always is."""
        config = self.config
        if config.drop_solved_after is not None and self.solved[row] >= config.drop_solved_after:
            return False
        if config.band is None or not self.visits[row]:
            return True
        low, high = config.band
        return bool(low <= self.rate[row] <= high) or self._draw(row, epoch) < config.outside

    def metrics(self) -> dict[str, float]:
        """How many prompts were visited; which shares of them were always, sometimes and never solved."""
        seen = self.visits > 0
        count = int(seen.sum())
        out = {"seen": float(count)}
        if count:
            rates = self.rate[seen]
            always, never = float((rates >= 1 - _TOLERANCE).mean()), float((rates <= _TOLERANCE).mean())
            out |= {"always_solved": always, "never_solved": never, "sometimes_solved": 1 - always - never}
        return out

    def histogram(self, bins: int = 10) -> list[int]:
        """How many visited prompts have a pass rate in each of `bins` equal parts of 0 to 1."""
        counts, _ = np.histogram(self.rate[self.visits > 0], bins=bins, range=(0.0, 1.0))
        return counts.tolist()

    def state(self) -> str:
        """What was visited, as text: 20 bytes a prompt, packed. JSON can hold it."""
        seen = np.flatnonzero(self.visits)
        packed = np.zeros(len(seen), _SEEN)
        packed["row"], packed["rate"] = seen, self.rate[seen]
        packed["visits"], packed["solved"] = self.visits[seen], self.solved[seen]
        return base64.b64encode(zlib.compress(packed.tobytes())).decode("ascii")

    def restore(self, state: str) -> None:
        """As `state` left it. Rows that the table no longer has are left out. Raises ValueError for another text."""
        try:
            packed = np.frombuffer(zlib.decompress(base64.b64decode(state, validate=True)), _SEEN)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"pass rates of prompts cannot be read: {error}") from error
        self.forget()
        packed = packed[packed["row"] < len(self.rate)]
        rows = packed["row"]
        self.rate[rows], self.visits[rows], self.solved[rows] = packed["rate"], packed["visits"], packed["solved"]

    def forget(self) -> None:
        """As if nothing was visited."""
        self.rate[:], self.visits[:], self.solved[:] = 0, 0, 0

    def _draw(self, row: int, epoch: int) -> float:
        """A number in [0, 1) that only the seed, the row and the epoch decide."""
        digest = hashlib.sha256(f"{self.seed} {epoch} {row}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def pass_rate(rewards: Sequence[float] | np.ndarray, config: CurriculumConfig) -> float:
    """The share of rewards that pass."""
    return float(np.mean(np.asarray(rewards, np.float64) >= config.passing_reward - _TOLERANCE))
