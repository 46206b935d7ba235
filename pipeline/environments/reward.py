"""What an environment is, and what it says of a conversation."""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.config.rewards.listed import hides_another
from pipeline.environments.conversation import Conversation
from pipeline.rewards.protocol import LARGEST
from pipeline.types import Prompt


@dataclass(frozen=True)
class Reward:
    """Of one conversation.

    value: of all of it; null where `turns` or `parts` are given: their sum.
    parts: components, each a metric reward/NAME and a column of RUN/episodes.
    turns: of each turn in order; where `value` is more than their sum, the last turn has the rest.
    note:  for people; a column of RUN/episodes.

    Numbers are finite as float32, as those of verifiers.
    """

    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    turns: Sequence[float] | None = None
    note: str = ""

    def by_turn(self) -> list[float]:
        """Rewards of the turns that add up to `total`; none where they are not given."""
        own = [float(reward) for reward in self.turns or ()]
        if own and self.value is not None:
            own[-1] += float(self.value) - math.fsum(own)
        return own

    def total(self) -> float:
        """The one number. Raises ValueError where there is none, or one that is not finite."""
        given = [*self.parts.values()] if self.turns is None else [*self.turns]
        if self.value is None and not given:
            raise ValueError("gave a reward without a value, parts or turns")
        value = math.fsum(map(float, given)) if self.value is None else float(self.value)
        numbers = (value, *self.parts.values(), *(self.turns or ()))
        if not all(abs(number) <= LARGEST for number in numbers):
            raise ValueError(f"gave a reward that is not finite as float32: {self}")
        return value


class Environment(Protocol):
    """What a person writes: a class with `run`, made once for each thread with environment.options; or a plain
    `async def` with the arguments of `run`, and the options after them."""

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward | float: ...


def reward_of(told: Any, turns: int) -> Reward:
    """What `run` returned, checked: its numbers are floats, its note is a text. turns: of the conversation. Raises
    ValueError in words that follow "the environment"."""
    if not isinstance(told, Reward):
        if not isinstance(told, bool | int | float) and not hasattr(told, "__float__"):
            raise ValueError(f"returned {told!r}, and not a number or a Reward")
        told = Reward(told)
    if not isinstance(told.parts, Mapping):
        raise ValueError(f"gave parts that are no mapping of names to numbers: {told.parts!r}")
    for name in told.parts:
        if not isinstance(name, str) or not name or hides_another(name):
            raise ValueError(f"gave a part named {name!r}: a name is a text, and none of the run's own metrics reward/")
    if told.turns is not None and (isinstance(told.turns, str | Mapping) or not hasattr(told.turns, "__len__")):
        raise ValueError(f"gave turns that are no list of numbers: {told.turns!r}")
    reward = Reward(
        None if told.value is None else _number(told.value),
        {name: _number(part) for name, part in told.parts.items()},
        None if told.turns is None else [_number(turn) for turn in told.turns],
        "" if told.note is None else str(told.note),
    )
    if reward.turns is not None and len(reward.turns) != turns:
        raise ValueError(f"gave {len(reward.turns)} rewards of turns for {turns} turns")
    reward.total()
    return reward


def _number(given: Any) -> float:
    if not isinstance(given, str):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):  # the last: of a tensor of many
            return float(given)
    raise ValueError(f"gave {reprlib.repr(given)} where a number belongs")
