"""Sources without end: synthetic tasks, and those of reasoning-gym."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from megatron_ext.config import Frozen
from pipeline.config.sources.asking import SourceConfig

SyntheticTask = Literal["digit_sort", "addition"]
"""Generators of `pipeline.data.synthetic`."""


class SyntheticTaskConfig(Frozen):
    """One synthetic task."""

    name: str = Field("digit_sort", description="the generator, by its registered name")
    min_digits: int = Field(4, ge=1, le=18, description="fewest digits of a question (of a number, for addition)")
    max_digits: int = Field(6, ge=1, le=18, description="most digits of a question (of a number, for addition)")
    question: str = Field("{question}", description="what the user says; a real model wants words around {question}")
    supervised_error_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the digits in supervised answers that are replaced by random ones: an imperfect teacher, "
        "which leaves reinforcement learning something to improve. Verifiers never see it",
    )
    seed: int = Field(0, ge=0, description="of the task; the run's seed is mixed in")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name not in get_args(SyntheticTask):
            raise ValueError(
                f"there is no synthetic task {self.name!r}; there are {', '.join(sorted(get_args(SyntheticTask)))}"
            )
        if self.min_digits > self.max_digits:
            raise ValueError(f"min_digits={self.min_digits} is more than max_digits={self.max_digits}; swap them")
        _holds_question(self.question)
        return self


class ReasoningGymSource(SourceConfig):
    """Tasks of reasoning-gym: endless generators that come with verifiers; rewards=reasoning_gym asks those."""

    kind: Literal["reasoning_gym"] = Field("reasoning_gym", description="this kind")
    tasks: dict[str, dict[str, Any]] = Field(
        description="task -> its parameters by reasoning-gym's names, and `weight` against the other tasks (1)"
    )
    question: str = Field("{question}", description="what the user says around {question}")
    seed: int = Field(0, ge=0, description="of the generators; the run's seed is mixed in")
    held_out: float = Field(
        0.1, ge=0, lt=1, description="share of the questions that is never trained on, chosen by a hash of their text"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks:
            raise ValueError("tasks names no task; write one, as tasks: {basic_arithmetic: {}}")
        for task, parameters in self.tasks.items():
            weight = parameters.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(f"tasks.{task}.weight is a number above 0, not {weight!r}")
            if taken := {"seed", "size"} & parameters.keys():
                raise ValueError(f"tasks.{task} cannot set {', '.join(sorted(taken))}; there is `seed` of the source")
        _holds_question(self.question)
        return self

    @property
    def default_name(self) -> str:
        """Each task is called by its own name."""
        return ""

    def name_of(self, task: str) -> str:
        """Of one task: behind the source's, where that has one."""
        return f"{self.name}.{task}" if self.name else task


class SyntheticSource(SourceConfig):
    """A synthetic task; a tenth of its questions is held out."""

    kind: Literal["synthetic"] = Field("synthetic", description="this kind")
    task: SyntheticTaskConfig = Field(description="the task")

    @property
    def default_name(self) -> str:
        """The task's."""
        return self.task.name


def _holds_question(text: str) -> None:
    if text.count("{question}") != 1:
        raise ValueError(f"the text {text!r} must hold {{question}} once, where the question goes")
