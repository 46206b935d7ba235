"""What every source has, how its prompts are put, which of them are left out, and which are asked again."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_ext.config import Frozen


class ChatConfig(Frozen):
    """What the chat template gets beside the messages of a row."""

    system_prompt: str | None = Field(
        None, description="the system message; it takes the place of one that a row's messages begin with"
    )
    tools: tuple[dict[str, Any], ...] = Field(
        (), description="JSON schemas of tools, for a chat template that lists them; a row's own list is added"
    )
    enable_thinking: bool | None = Field(
        None, description="the switch that Qwen3, GLM-4.5 and others know by this name; null: the template's default"
    )
    variables: dict[str, Any] = Field({}, description="any other variable of the chat template, by its name")

    @property
    def template_variables(self) -> dict[str, Any]:
        """All variables."""
        switch = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return self.variables | switch


class SourceConfig(Frozen):
    """What every kind of source has."""

    name: str = Field("", description="what it is called in metrics and messages; empty: made from what it reads")
    weight: float = Field(1.0, gt=0, description="share of the prompts, against the weights of the other sources")
    use: Literal["both", "prompts", "supervised"] = Field(
        "both", description="what it is for: prompts that are sampled from, answers that supervised steps imitate"
    )
    chat: ChatConfig | None = Field(None, description="as data.chat, for this source; null: data.chat")
    metadata: dict[str, Any] = Field({}, description="keys that verifiers get with each of its prompts")


class FiltersConfig(Frozen):
    """Which rows are left out. What is left out is counted, and the first of each kind is named."""

    too_long: Literal["stop", "drop"] = Field("stop", description="more tokens than data.max_prompt_tokens")
    empty: Literal["stop", "drop", "keep"] = Field("stop", description="a prompt or an answer of white space alone")
    duplicates: Literal["stop", "drop", "keep"] = Field(
        "keep", description="a prompt that an earlier row of the source holds too"
    )


class CurriculumConfig(Frozen):
    """Which prompts are asked again, by the share of their answers that passed. It acts on rows, not on generators."""

    passing_reward: float = Field(1.0, description="reward from which an answer has passed")
    band: tuple[float, float] | None = Field(
        None, description="lowest and highest pass rate of prompts that are asked again, as [0.1, 0.9]; null: all are"
    )
    outside: float = Field(
        0.1, ge=0, le=1, description="share of the prompts outside the band that is asked all the same"
    )
    drop_solved_after: int | None = Field(
        None, ge=1, description="a prompt whose answers all passed this many times in a row is not asked again"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise ValueError(f"band is two pass rates from 0 to 1, the lower one first, not {list(self.band)}")
        return self

    @property
    def active(self) -> bool:
        """Whether any prompt may be passed over."""
        return self.band is not None or self.drop_solved_after is not None
