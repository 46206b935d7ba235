"""Parquet files and data sets of Hugging Face, through `datasets`: rows lie in Arrow files, mapped to memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.sources import HuggingFaceSource, ParquetSource
from pipeline.data.chat import DataError
from pipeline.data.tables.row_reader import as_json, columns_of

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1024  # rows read at once


class ArrowTable:
    """The rows of a data set."""

    def __init__(self, data: Dataset, place: str):
        self.data, self.place = data, place

    def __len__(self) -> int:
        return len(self.data)

    def where(self, row: int) -> str:
        """By the row's number from 0, as `datasets` counts."""
        return f"{self.place}, row {row}"

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        """Every row."""
        names = self.data.column_names
        row = 0
        batches: Any = self.data.iter(batch_size=_BATCH)
        for batch in batches:
            for values in zip(*(batch[name] for name in names), strict=True):
                yield row, _plain(dict(zip(names, values, strict=True)))
                row += 1

    def record(self, row: int) -> dict[str, Any]:
        """One row. Raises DataError for what JSON does not hold."""
        found = _plain(self.data[row])
        if isinstance(found, DataError):
            raise found
        return found


def open_parquet(source: ParquetSource) -> ArrowTable:
    """Raises DataError where there is no such file, or it is no Parquet."""
    if not source.files:
        raise DataError(f"there is no data file {source.path}")
    files = [str(file) for file in source.files]
    data = _loaded(str(source.path), lambda datasets: datasets.load_dataset("parquet", data_files=files, split="train"))
    return ArrowTable(_kept(data, source), str(source.path))


def open_huggingface(source: HuggingFaceSource) -> ArrowTable:
    """A directory of `save_to_disk` or of data files, or a name on the hub. Raises DataError where it does not load."""
    place = Path(source.path)
    saved = any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))

    def load(datasets: Any) -> Dataset:
        if not saved:
            return datasets.load_dataset(
                source.path, source.subset, split=source.split, revision=source.revision, streaming=False
            )
        found = datasets.load_from_disk(source.path)
        if not isinstance(found, datasets.DatasetDict):
            return found
        if source.split not in found:
            raise DataError(f"{source.path} has no split {source.split!r}; it has {', '.join(found)}")
        return found[source.split]

    return ArrowTable(_kept(_loaded(source.path, load), source), f"{source.path} ({source.split})")


def _loaded(name: str, load: Any) -> Dataset:
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    try:
        data = load(datasets)
    except DataError:
        raise
    # datasets, its readers and the hub's client raise what they like, one inside another.
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        words = " ".join(str(first).split())[:300]
        here = Path(name).is_absolute() or Path(name).exists()
        advice = "" if here else "; a machine without a network takes a local directory"
        raise DataError(f"the data set {name} does not load: {type(first).__name__}: {words}{advice}") from error
    pyarrow.default_memory_pool().release_unused()  # what the files were converted in, half a gigabyte a million rows
    return data


def _kept(data: Dataset, source: ParquetSource | HuggingFaceSource) -> Dataset:
    """Without columns that nobody reads: pictures and sounds would be decoded."""
    if source.keep is None:
        return data
    columns = source.columns
    named = {columns.prompt, columns.messages, columns.answer, columns.tools, *source.keep.values()}
    named |= columns_of(source.prompt_template or "")
    wanted = {name.partition(".")[0] for name in named if name} | named
    return data.select_columns([name for name in data.column_names if name in wanted])


def _plain(record: dict[str, Any]) -> dict[str, Any] | DataError:
    try:
        return {key: as_json(value, key) for key, value in record.items()}
    except DataError as error:
        return error
