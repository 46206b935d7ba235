"""The sources of a configuration, opened: every row of a table was looked at, every generator has made an entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.config.data import DataConfig
from pipeline.config.sources import (
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    ReasoningGymSource,
    RowsConfig,
    Source,
    SyntheticSource,
)
from pipeline.data.chat import DataError, PromptWriter, check_template
from pipeline.data.procedural import GymQuestions
from pipeline.data.streams import Order, Part, Questions, Stream, TableQuestions
from pipeline.data.synthetic import SyntheticTask
from pipeline.data.tables.arrow import open_huggingface, open_parquet
from pipeline.data.tables.jsonl import JsonlTable
from pipeline.data.tables.row_reader import Lacks, RowReader, Table
from pipeline.data.tables.screen import screen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_sources(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    seed: int,
    part: Part,
    supervised: bool,
    lacks: Lacks,
    say: Callable[[str], None],
) -> list[tuple[Questions, dict[Order, float]]]:
    """The questions of each source, of reasoning-gym those of each task, with their weights in each order.

    seed: the run's. supervised: answers will be imitated. lacks: what verifiers would miss of a row. say: hears of what
    was left out.
    Raises DataError, naming the row or the task.
    """
    out: list[tuple[Questions, dict[Order, float]]] = []
    general = PromptWriter(tokenizer, vocab_size, config.max_prompt_tokens, config.chat)
    for source in config.origins:
        own, stream = source.chat, _stream(source, part)
        writer = general
        if own is not None:
            writer = PromptWriter(tokenizer, vocab_size, config.max_prompt_tokens, own)
        if isinstance(source, SyntheticSource):
            name = source.name or source.default_name
            task = SyntheticTask(source.task, writer, seed, stream=stream, name=name, metadata=source.metadata)
            out.append((task, _weights(source)))
        elif isinstance(source, ReasoningGymSource):
            out += [(task, _weights(source, share)) for task, share in _tasks(source, writer, seed, stream)]
        else:
            rows = _rows(source, writer, config, seed=seed, stream=stream, supervised=supervised, lacks=lacks, say=say)
            out.append((rows, _weights(source)))
    names = [questions.name for questions, _ in out]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two of data.sources are called {twice!r}; give one of them another `name`")
    return out


def _weights(source: Source, share: float = 1.0) -> dict[Order, float]:
    """Of a source, or of a share of it, in each order; 0 where it is not for that."""
    orders: tuple[Order, ...] = ("prompts", "supervised")
    return {order: source.weight * share if source.use in ("both", order) else 0.0 for order in orders}


def _stream(source: Source, part: Part) -> Stream:
    if part != "evaluation":
        return part
    return "train" if isinstance(source, RowsConfig) and not source.held_out else "held_out"


def _rows(
    source: RowsConfig,
    writer: PromptWriter,
    config: DataConfig,
    *,
    seed: int,
    stream: Stream,
    supervised: bool,
    lacks: Lacks,
    say: Callable[[str], None],
) -> TableQuestions:
    if source.columns.tools is not None:
        check_template(writer.tokenizer, ["tools"])
    table, name = _table(source)
    reader = RowReader(source, name, lacks)
    screened = screen(table, reader, writer, config, answers=supervised, say=say)
    if screened.report.left_out or screened.report.duplicates:
        say(f"{name}: {screened.report}")
    return TableQuestions(
        table, reader, writer, screened, config.curriculum, stream=stream, shuffle=config.shuffle, seed=seed
    )


def _table(source: Source | RowsConfig) -> tuple[Table, str]:
    if isinstance(source, JsonlSource):
        return JsonlTable(source.path), source.name or source.default_name
    if isinstance(source, ParquetSource):
        return open_parquet(source), source.name or source.default_name
    assert isinstance(source, HuggingFaceSource)
    return open_huggingface(source), source.name or source.default_name


def _tasks(
    source: ReasoningGymSource, writer: PromptWriter, seed: int, stream: Stream
) -> list[tuple[Questions, float]]:
    """Each task, called by its own name behind the source's where that has one, and its share of the source."""
    weights = {task: float(parameters.get("weight", 1)) for task, parameters in source.tasks.items()}
    total = sum(weights.values())
    return [
        (
            GymQuestions(source.name_of(task), task, source, writer, seed, stream),
            weight / total,
        )
        for task, weight in weights.items()
    ]
