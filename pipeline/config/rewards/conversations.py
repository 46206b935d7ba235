"""Conversations of many turns: the environment that leads them, and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_ext.config import Frozen


class EnvironmentConfig(Frozen):
    """An environment of the user's own, a function or a program, and the limits of its conversations."""

    function: str | None = Field(
        None,
        description="package.module:NAME, a class with `async def run(conversation, prompt)`, or such a function "
        "(docs/environments.md)",
    )
    command: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="in place of function: a program and its arguments, started for each conversation, which it leads "
        "over HTTP; its last line is the reward (docs/endpoint.md)",
    )
    directory: Path | None = Field(
        None,
        description="where its module is looked for first, or its command is started; null: a module beside the "
        "configuration, where it is there; a command in the run's own working directory",
    )
    variables: tuple[str, ...] = Field(
        (), description="variables that a command gets though their names look like secrets"
    )
    options: dict[str, Any] = Field({}, description="what the class, or the function, gets by name")
    tool_parser: str | None = Field(
        None,
        description="SGLang's parser of the model's tool calls (qwen25, deepseekv3, kimi_k2, ...), for programs that "
        "talk over HTTP; null: tools are refused there",
    )
    reasoning_parser: str | None = Field(
        None,
        description="SGLang's parser of the model's thinking (qwen3, deepseek-r1, ...), for programs that talk over "
        "HTTP; null: thinking stays in the content",
    )
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
    def _named(cls, name: str | None) -> str | None:
        if name is None:
            return None
        module, colon, attribute = name.partition(":")
        if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"an environment reads package.module:NAME, not {name!r}")
        return name

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.function is None) == (self.command is None):
            raise ValueError("an environment has either function=package.module:NAME or command=[program, argument]")
        if self.command is not None and self.options:
            raise ValueError("options are for environment.function; a command has arguments")
        return self
