"""Sources of rows: files and data sets, and how a row becomes a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_ext.config import Frozen
from pipeline.config.sources.asking import SourceConfig


class ColumnsConfig(Frozen):
    """Which columns (keys of a JSON line) hold what; a dot goes into an object: reward_model.ground_truth."""

    prompt: str = Field("prompt", description="a text, or a list of messages")
    messages: str = Field("messages", description="a list of {role, content}, in place of a prompt")
    answer: str | None = Field("answer", description="the right answer, a text or a number; null: rows have none")
    tools: str | None = Field(None, description="a list of JSON schemas of tools, or its JSON as text; null: none")


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
