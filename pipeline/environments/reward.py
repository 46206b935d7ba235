"""What an environment is, and what it says of a conversation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.environments.conversation import Conversation
from pipeline.types import Prompt


@dataclass(frozen=True)
class Reward:
    """Of one conversation.

    value: of all of it; null where `turns` or `parts` are given: their sum.
    parts: components, each a metric reward/NAME.
    turns: of each turn in order; where `value` is more than their sum, the last turn has the rest.
    note:  for people; a column of RUN/episodes.
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
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"gave a reward that is not finite: {self}")
        return value


class Environment(Protocol):
    """What a person writes: a class with `run`, made once for each thread with environment.options; or a plain
    `async def` with the arguments of `run`, and the options after them."""

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward | float: ...


def reward_of(told: Any, turns: int) -> Reward:
    """What `run` returned, checked. turns: of the conversation. Raises ValueError in words that follow "the
    environment"."""
    if isinstance(told, Reward):
        reward = told
    elif isinstance(told, bool | int | float) or hasattr(told, "__float__"):
        reward = Reward(float(told))
    else:
        raise ValueError(f"returned {told!r}, and not a number or a Reward")
    if reward.turns is not None and len(reward.turns) != turns:
        raise ValueError(f"gave {len(reward.turns)} rewards of turns for {turns} turns")
    reward.total()
    return reward
