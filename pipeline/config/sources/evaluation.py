"""Evaluation: named sets of questions that are answered during a run, and what follows from their scores."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from megatron_ext.config import Frozen
from pipeline.config.rewards import Rewards
from pipeline.config.sources import ChatConfig, ReasoningGymSource, Source, SyntheticSource, names_of


class EvaluationSet(Frozen):
    """One set: its questions, how they are answered, and how often."""

    name: str = Field(description="what metrics and files call it: letters, digits, dots, dashes and underscores")
    sources: tuple[Source, ...] = Field(
        (),
        description="where its questions come from, as data.sources; of a source with held_out, and of a generator, "
        "the held-out part counts. Empty: what the run's own data holds out",
    )
    chat: ChatConfig | None = Field(None, description="what the chat template gets; null: data.chat")
    prompts: int | None = Field(
        None,
        ge=1,
        description="so many questions, the same ones each time; null: all there are, which generators do not have",
    )
    samples: int = Field(1, ge=1, description="answers a question")
    k: tuple[int, ...] = Field(
        (), description="of pass@k and majority@k, each at most `samples`; empty: 1 and `samples`"
    )
    every_steps: int = Field(20, ge=1, description="RL steps between two evaluations; the last step has one too")
    at_start: bool = Field(True, description="evaluate the model that the run begins with")
    max_new_tokens: int | None = Field(None, ge=1, description="longest answer, tokens; null: rollout.max_new_tokens")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; null: precision.temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass that is kept")
    top_k: int = Field(-1, ge=-1, description="tokens that are kept; -1: all")
    min_p: float = Field(0.0, ge=0, le=1, description="least probability of a token, against the likeliest")
    rewards: Rewards | None = Field(None, description="verifiers of this set, written like `rewards`; null: the run's")
    passing_reward: float = Field(1.0, description="reward from which an answer has passed")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ValueError(f"{name!r} becomes a folder and a metric; take letters, digits, dots, dashes, underscores")
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if wrong := [k for k in self.k if not 1 <= k <= self.samples]:
            raise ValueError(f"pass@{wrong[0]} needs that many answers, and samples={self.samples}; raise samples")
        if self.prompts is None and any(isinstance(s, SyntheticSource | ReasoningGymSource) for s in self.sources):
            raise ValueError(f"the set {self.name} has a generator without end; say how many `prompts` it asks")
        names = [name for name in names_of(self.sources) if name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sources of the set {self.name} are called {twice!r}; give one another `name`")
        return self

    @property
    def ks(self) -> tuple[int, ...]:
        """`k`, or its default, in rising order."""
        return tuple(sorted(set(self.k or (1, self.samples))))

    @property
    def scores(self) -> list[str]:
        """What it may be measured by: the names behind eval/NAME/."""
        several = [k for k in self.ks if k > 1]
        return ["reward", *(f"pass@{k}" for k in self.ks), *(f"majority@{k}" for k in several)]


class BestConfig(Frozen):
    """The best checkpoint, by one score of an evaluation."""

    score: str = Field(description="metric of an evaluation, as eval/gsm8k-test/pass@1; the highest is the best")
    export: str | None = Field(
        None,
        description="where the best model goes each time, as a Hugging Face directory: a path, or hub:OWNER/NAME, "
        "which needs a token in HF_TOKEN",
    )
    patience: int | None = Field(
        None, ge=1, description="the run ends after so many evaluations in a row that were no better; null: it goes on"
    )

    @property
    def set_name(self) -> str:
        """The set whose score it is."""
        return self.score.removeprefix("eval/").rpartition("/")[0]
