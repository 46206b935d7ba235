"""Where prompts come from: files, data sets, generators; how a row becomes a prompt, and which rows are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from megatron_ext.config import Frozen

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


class ColumnsConfig(Frozen):
    """Which columns (keys of a JSON line) hold what; a dot goes into an object: reward_model.ground_truth."""

    prompt: str = Field("prompt", description="a text, or a list of messages")
    messages: str = Field("messages", description="a list of {role, content}, in place of a prompt")
    answer: str | None = Field("answer", description="the right answer, a text or a number; null: rows have none")
    tools: str | None = Field(None, description="a list of JSON schemas of tools, or its JSON as text; null: none")


class SourceConfig(Frozen):
    """What every kind of source has."""

    name: str = Field("", description="what it is called in metrics and messages; empty: made from what it reads")
    weight: float = Field(1.0, gt=0, description="share of the prompts, against the weights of the other sources")
    chat: ChatConfig | None = Field(None, description="as data.chat, for this source; null: data.chat")
    metadata: dict[str, Any] = Field({}, description="keys that verifiers get with each of its prompts")


class RowsConfig(SourceConfig):
    """What every source of rows has."""

    columns: ColumnsConfig = Field(
        default_factory=ColumnsConfig,  # pyright: ignore[reportArgumentType]
        description="which columns hold prompt and answer",
    )
    prompt_template: str | None = Field(
        None,
        description="the user's message, with {column} for what a row holds there; {{ and }} are braces beside a name, "
        "and other braces stay. null: the prompt as it is",
    )
    answer_pattern: str | None = Field(
        None, description=r"regular expression whose first group is the answer in its column, as '####\s*(.+)'"
    )
    keep: dict[str, str] | None = Field(
        None, description="what verifiers get beside the answer, as {name: column}; null: every other column"
    )
    json_columns: tuple[str, ...] = Field((), description="columns that hold JSON as text, which is read first")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the prompts that is never trained on, chosen by a hash of their text"
    )


class JsonlSource(RowsConfig):
    """A file of JSON lines."""

    kind: Literal["jsonl"] = Field("jsonl", description="this kind")
    path: Path = Field(description="the file, an object a line")

    @property
    def default_name(self) -> str:
        """From the file's name."""
        return self.path.stem


class ParquetSource(RowsConfig):
    """Parquet files."""

    kind: Literal["parquet"] = Field("parquet", description="this kind")
    path: Path = Field(description="a file, or several of the same columns as a pattern: data/train-*.parquet")

    @property
    def default_name(self) -> str:
        """From the file's name."""
        return self.path.stem.rstrip("-*?.[]") or "parquet"

    @property
    def files(self) -> list[Path]:
        """What there is of it now, in the order of names."""
        if self.path.is_file():
            return [self.path]
        root = Path(self.path.anchor)
        return sorted(p for p in root.glob(str(self.path.relative_to(root))) if p.is_file())


class HuggingFaceSource(RowsConfig):
    """A data set of Hugging Face's `datasets`."""

    kind: Literal["huggingface"] = Field("huggingface", description="this kind")
    path: str = Field(description="a directory (of save_to_disk, or of data files), or a name on the hub: openai/gsm8k")
    subset: str | None = Field(None, description="the configuration of the data set, as main of openai/gsm8k")
    split: str = Field("train", description="the split, as train, test or train[:1000]")
    revision: str | None = Field(None, description="commit, branch or tag on the hub; a commit never changes")

    @property
    def default_name(self) -> str:
        """From the last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]


class ReasoningGymSource(SourceConfig):
    """Tasks of reasoning-gym: endless generators that come with verifiers; data.reward=reasoning_gym asks those."""

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


class SyntheticSource(SourceConfig):
    """A synthetic task; a tenth of its questions is held out."""

    kind: Literal["synthetic"] = Field("synthetic", description="this kind")
    task: SyntheticTaskConfig = Field(description="the task")

    @property
    def default_name(self) -> str:
        """The task's."""
        return self.task.name


Source = Annotated[
    JsonlSource | ParquetSource | HuggingFaceSource | ReasoningGymSource | SyntheticSource, Field(discriminator="kind")
]


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


def names_of(sources: tuple[Source, ...]) -> list[str]:
    """What each source is called; an unnamed one of reasoning-gym has none of its own, its tasks have."""
    return [source.name or source.default_name for source in sources]


def _holds_question(text: str) -> None:
    if text.count("{question}") != 1:
        raise ValueError(f"the text {text!r} must hold {{question}} once, where the question goes")
