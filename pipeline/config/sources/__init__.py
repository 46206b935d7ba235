"""Where prompts come from: one class a kind of source, told apart by its `kind`."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from pipeline.config.sources.asking import ChatConfig, CurriculumConfig, FiltersConfig, SourceConfig
from pipeline.config.sources.generators import ReasoningGymSource, SyntheticSource, SyntheticTaskConfig
from pipeline.config.sources.row_sources import ColumnsConfig, HuggingFaceSource, JsonlSource, ParquetSource, RowsConfig

Source = Annotated[
    JsonlSource | ParquetSource | HuggingFaceSource | ReasoningGymSource | SyntheticSource, Field(discriminator="kind")
]

__all__ = [
    "ChatConfig",
    "ColumnsConfig",
    "CurriculumConfig",
    "FiltersConfig",
    "HuggingFaceSource",
    "JsonlSource",
    "ParquetSource",
    "ReasoningGymSource",
    "RowsConfig",
    "Source",
    "SourceConfig",
    "SyntheticSource",
    "SyntheticTaskConfig",
    "asked_of",
    "names_of",
]


def names_of(sources: tuple[Source, ...]) -> list[str]:
    """What each source is called; an unnamed one of reasoning-gym has no name of its own, its tasks have."""
    return [source.name or source.default_name for source in sources]


def asked_of(sources: Iterable[Source]) -> list[str]:
    """What questions are called in metrics, and in `sources` of a verifier: each source, and each task of one."""
    return [
        name
        for source in sources
        for name in (
            map(source.name_of, source.tasks)
            if isinstance(source, ReasoningGymSource)
            else (source.name or source.default_name,)
        )
    ]
