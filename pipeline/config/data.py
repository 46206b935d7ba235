"""Where prompts come from, and what grades their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from megatron_ext.config import Frozen

SyntheticTask = Literal["digit_sort", "addition"]
"""Generators of `pipeline.data.synthetic`."""


OnRewardFailure = Literal["exclude", "zero", "drop_group", "stop"]
"""What becomes of an answer that the verifier failed on."""


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
        if self.question.count("{question}") != 1:
            raise ValueError(f"the text {self.question!r} must hold {{question}} once, where the question goes")
        return self


class DataConfig(Frozen):
    """The prompts of a run and the verifier of their answers."""

    task: SyntheticTaskConfig | None = Field(None, description="a synthetic task")
    path: Path | None = Field(
        None,
        description='JSONL file, a line {"prompt": text or "messages": [...], "answer": text}; other keys are kept',
    )
    shuffle: bool = Field(True, description="another order of the file's lines each epoch; false: the file's own order")
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt, tokens, chat template included")
    reward: str = Field("exact_match", description="verifier: a registered name, or package.module:function")
    reward_directory: Path | None = Field(
        None,
        description="folder that the verifier's module is looked for in first; null: that of the YAML file, or of its "
        "nearest base, where the module lies there",
    )
    reward_workers: int = Field(
        8,
        ge=1,
        description="processes of a verifier, so many answers at a time; exact_match has one",
    )
    reward_timeout_s: float = Field(30.0, gt=0, description="a verifier that takes longer on one answer is killed")
    reward_memory_gb: float = Field(
        4.0, gt=0, description="resident memory of a verifier and what it starts, 1e9 bytes; with more it is killed"
    )
    reward_environment: tuple[str, ...] = Field(
        (), description="variables that verifiers get though their names look like secrets, as that of a judge's key"
    )
    on_reward_failure: OnRewardFailure = Field(
        "exclude",
        description="an answer that the verifier hangs on, crashes on or has no number for. exclude: it is in no "
        "baseline and no loss, and its group stays if two are left; zero: it has reward 0; drop_group: nor are the "
        "others of its group; stop: the run ends",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of data.task (a synthetic task) and data.path (a JSONL file)")
        return self
