"""Conversations of many turns: the environment that leads them, and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_ext.config import Frozen


class EnvironmentConfig(Frozen):
    """An environment of the user's own, and the limits of its conversations."""

    function: str = Field(
        description="package.module:NAME, a class with `async def run(conversation, prompt)`, or such a function "
        "(docs/environments.md)"
    )
    directory: Path | None = Field(
        None, description="where its module is looked for first; null: beside the configuration, where it is there"
    )
    options: dict[str, Any] = Field({}, description="what the class, or the function, gets by name")
    replies: tuple[Literal["user", "tool"], ...] = Field(
        ("user",),
        min_length=1,
        description="roles of the messages that it appends, with which the template is tried",
    )
    history: Literal["refuse", "split"] = Field(
        "refuse",
        description="where the chat template changes what stands in a conversation. refuse: nothing starts; split: the "
        "conversation goes on as another rollout",
    )
    max_turns: int = Field(8, ge=1, description="times that the policy speaks in a conversation")
    max_tokens: int = Field(2048, ge=1, description="of a conversation after its prompt, whoever said them")
    timeout_s: float = Field(
        600.0, gt=0, description="a conversation that takes longer, transfers of weights included, has failed"
    )
    cut_reward: float = Field(
        0.0, description="of a conversation that max_turns or max_tokens ended, where the environment gives none"
    )
    at_once: int = Field(256, ge=1, description="conversations at a time; more wait for one to end")
    threads: int = Field(
        8,
        ge=1,
        description="threads that the environment runs in, apart from the servers' connections; one that a "
        "tool blocks holds up its own conversations only",
    )

    @field_validator("function")
    @classmethod
    def _named(cls, name: str) -> str:
        module, colon, attribute = name.partition(":")
        if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"an environment reads package.module:NAME, not {name!r}")
        return name
