"""Which source the next prompt comes from: each as often as its weight says, in every stretch, and the same again.

Every draw gives each source its weight as credit and takes the sum of all weights from the one with the most credit. So
after n draws a source has given its share of n to within one prompt, and the credits are all that a resumption needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Cursor:
    """Where a mixture stands. count: prompts drawn. positions, credits: of each source."""

    count: int
    positions: tuple[int, ...]
    credits: tuple[Fraction, ...]

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """JSON can hold it."""
        return {
            name: [position, str(credit)]
            for name, position, credit in zip(names, self.positions, self.credits, strict=True)
        }


class Mixture:
    """Sources by name, with their weights."""

    def __init__(self, names: Sequence[str], weights: Sequence[float]):
        self.names = list(names)
        self.weights = [Fraction(str(weight)) for weight in weights]
        self.total = sum(self.weights)

    def start(self) -> Cursor:
        """Of a run that begins."""
        return Cursor(0, (0,) * len(self.names), (Fraction(0),) * len(self.names))

    def next(self, cursor: Cursor) -> tuple[int, tuple[Fraction, ...]]:
        """The source that the next prompt comes from, and the credits after it."""
        credit = [c + weight for c, weight in zip(cursor.credits, self.weights, strict=True)]
        chosen = max(range(len(credit)), key=lambda i: (credit[i], -i))
        credit[chosen] -= self.total
        return chosen, tuple(credit)

    def restored(self, count: int, state: Mapping[str, Any]) -> Cursor:
        """The cursor that left `state`. A source that was not there begins at its beginning, and one that is no longer
        there is forgotten. Raises ValueError for what `Cursor.state` does not return."""
        positions, credits = [], []
        for name in self.names:
            position, credit = state.get(name, (0, "0"))
            if not isinstance(position, int) or isinstance(position, bool) or position < 0:
                raise ValueError(f"the position of {name} is a count, not {position!r}")
            positions.append(position)
            credits.append(Fraction(credit))
        return Cursor(count, tuple(positions), tuple(credits))
