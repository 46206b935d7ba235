"""Where prompts come from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_ext.config import Frozen
from pipeline.config.sources import (
    ChatConfig,
    CurriculumConfig,
    FiltersConfig,
    JsonlSource,
    ParquetSource,
    Source,
    SyntheticSource,
    SyntheticTaskConfig,
    names_of,
)


class DataConfig(Frozen):
    """The prompts of a run."""

    task: SyntheticTaskConfig | None = Field(None, description="a synthetic task; short for one source of that kind")
    path: Path | None = Field(
        None,
        description='JSONL file, a line {"prompt": text or "messages": [...], "answer": text}; other keys are kept; '
        "short for one source of that kind",
    )
    sources: tuple[Source, ...] = Field((), description="where prompts come from, in place of task and path")
    chat: ChatConfig = Field(
        default_factory=ChatConfig,  # pyright: ignore[reportArgumentType]
        description="what the chat template gets beside the messages",
    )
    filters: FiltersConfig = Field(
        default_factory=FiltersConfig,  # pyright: ignore[reportArgumentType]
        description="which rows are left out",
    )
    on_bad_line: Literal["stop", "skip"] = Field(
        "stop",
        description="a line that is wrong (not JSON, a column missing, of another type, refused by the chat template). "
        "stop: it is named, and nothing starts; skip: it is counted",
    )
    curriculum: CurriculumConfig = Field(
        default_factory=CurriculumConfig,  # pyright: ignore[reportArgumentType]
        description="which prompts are asked again",
    )
    shuffle: bool = Field(True, description="another order of a source's rows each epoch; false: their own order")
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt, tokens, chat template included")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if [self.task is not None, self.path is not None, bool(self.sources)].count(True) != 1:
            raise ValueError(
                "give exactly one of data.task (a synthetic task), data.path (a JSONL file) and data.sources (a list)"
            )
        names = [name for name in names_of(self.sources) if name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two of data.sources are called {twice!r}; give one of them another `name`")
        return self

    @property
    def origins(self) -> tuple[Source, ...]:
        """The sources, however they were written."""
        if self.task is not None:
            return (SyntheticSource.model_validate({"task": self.task}),)
        return (JsonlSource.model_validate({"path": self.path}),) if self.path is not None else self.sources


def not_read(path: Path) -> str:
    """Why a data file is a missing one, in a sentence."""
    if path.is_dir():
        return f"the data file {path} is a directory; name a file in it"
    if path.exists():
        return f"the data file {path} is a pipe or a device, and lines are read more than once; write them to a file"
    return f"there is no data file {path}"


def missing_file(sources: Iterable[Source]) -> Path | None:
    """The first file of a source that is not there, or is no file; a pattern is missing where nothing matches it."""
    for source in sources:
        if isinstance(source, JsonlSource) and not source.path.is_file():
            return source.path
        if isinstance(source, ParquetSource) and not source.files:
            return source.path
    return None
