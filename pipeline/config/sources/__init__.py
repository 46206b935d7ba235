"""Where prompts come from: one class a kind of source, told apart by its `kind`."""

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
    "names_of",
]


def names_of(sources: tuple[Source, ...]) -> list[str]:
    """What each source is called; an unnamed one of reasoning-gym has no name of its own, its tasks have."""
    return [source.name or source.default_name for source in sources]
