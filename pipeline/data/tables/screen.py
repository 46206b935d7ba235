"""The look at every row before a run starts: what is wrong is named, what is filtered is counted.

A row is read and mapped, and nothing of it is kept but its number and a hash. It is tokenized only where that could
show something: where its text has more bytes than a prompt may have tokens, or where the tokenizer does not read any
text. So a million rows take seconds. Prompts are tokenized again when they are asked, and looked at in full then.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.chat import Asked, DataError, PromptWriter, TooLongError
from pipeline.data.held_out import held_out_share
from pipeline.data.tables.row_reader import RowReader, Table

_BATCH = 512  # texts tokenized at once
_PROGRESS_S = 5.0
_OFTEN = 4096  # rows between two looks at the clock
KINDS = ("bad_line", "too_long", "empty", "duplicate")
"""Why a row is left out."""


@dataclass
class Report:
    """What became of the rows of a table. first: what the first row of each kind of `left_out` was, with its place."""

    rows: int = 0
    prompts: int = 0
    held_out: int = 0
    duplicates: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave_out(self, kind: str, words: str) -> None:
        """Count a row."""
        self.left_out[kind] += 1
        self.first.setdefault(kind, words)

    def facts(self) -> dict[str, Any]:
        """For facts.json."""
        counts = {"rows": self.rows, "prompts": self.prompts, "held_out": self.held_out, "duplicates": self.duplicates}
        return counts | {"left_out": {kind: self.left_out[kind] for kind in KINDS}, "first": dict(self.first)}

    def __str__(self) -> str:
        kinds = "; ".join(
            f"{self.left_out[kind]:,} {kind.replace('_', ' ')}, the first: {self.first[kind]}"
            for kind in KINDS
            if self.left_out[kind]
        )
        held_out = f" and {self.held_out:,} held out" if self.held_out else ""
        twice = f"; {self.duplicates:,} of them a second time" if self.duplicates > self.left_out["duplicate"] else ""
        kinds = f"; left out: {kinds}" if kinds else ""
        return f"{self.rows:,} rows, {self.prompts:,} prompts{held_out}{twice}{kinds}"


@dataclass(frozen=True)
class Screened:
    """train, held_out: [kept] int64, numbers of rows, in the order of the table."""

    train: np.ndarray
    held_out: np.ndarray
    report: Report


class _Screen:
    def __init__(
        self,
        table: Table,
        reader: RowReader,
        writer: PromptWriter,
        config: DataConfig,
        *,
        answers: bool,
        say: Callable[[str], None],
    ):
        self.table, self.reader, self.writer, self.config = table, reader, writer, config
        self.answers, self.say = answers, say
        self.all = not writer.reads_any_text
        self.report = Report()
        self.share = reader.config.held_out
        # Of each row that has passed so far: its number, a hash of its text, whether it is held out.
        self.rows, self.hashes, self.apart = array("q"), array("Q"), array("b")
        self.refused: set[int] = set()
        self.waiting: list[Asked] = []

    def __call__(self) -> Screened:
        said = time.monotonic()
        for row, record in self.table.scan():
            self.report.rows += 1
            if isinstance(record, DataError):
                self._bad(DataError(f"{self.table.where(row)}: {record}"))
            else:
                self._row(row, record)
            if row % _OFTEN == 0 and time.monotonic() - said > _PROGRESS_S:
                said = time.monotonic()
                self.say(f"{self.reader.name}: {row:,} rows are read")
        self._tokenize()
        return self._screened()

    def _row(self, row: int, record: dict[str, Any]) -> None:
        try:
            asked = self.reader(record, row, "")
            text = asked.text
            looks = self.all or self.writer.at_most(asked) > self.writer.limit
            if self.answers and asked.answer is None:
                raise DataError("there is no answer, and supervised steps imitate one")
        except DataError as error:
            self._bad(DataError(f"{self.table.where(row)}: {error}"))
            return
        if not text.strip() or (asked.answer is not None and not asked.answer.strip()):
            what = "prompt" if not text.strip() else "answer"
            words = f"{self.table.where(row)}: the {what} is empty; data.filters.empty=drop leaves such rows out"
            if self._filtered(self.config.filters.empty, "empty", DataError(words)):
                return
        self.rows.append(row)
        self.hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))
        self.apart.append(bool(self.share) and held_out_share(text) < self.share)
        if looks:
            self.waiting.append(asked._replace(where=self.table.where(row)))
            if len(self.waiting) == _BATCH:
                self._tokenize()

    def _tokenize(self) -> None:
        waiting, self.waiting = self.waiting, []
        rows = [int(asked.origin.rpartition(":")[2]) for asked in waiting]
        for row, asked, prompt in zip(rows, waiting, self.writer.prompts(waiting, rows), strict=True):
            error = prompt if isinstance(prompt, DataError) else None
            if error is None and self.answers:
                error = _error_of(lambda asked=asked: self.writer.answer(asked))
            if isinstance(error, TooLongError):
                self._filtered(self.config.filters.too_long, "too_long", error)
            elif error is not None:
                self._bad(error)
            if error is not None:
                self.refused.add(row)

    def _bad(self, error: DataError) -> None:
        if self.config.on_bad_line == "stop":
            raise error
        self.report.leave_out("bad_line", str(error))

    def _filtered(self, what: str, kind: str, error: DataError) -> bool:
        """Whether a row that a filter finds is left out."""
        if what == "stop":
            raise error
        if what == "drop":
            self.report.leave_out(kind, str(error))
        return what == "drop"

    def _screened(self) -> Screened:
        rows, report = np.array(self.rows, np.int64), self.report
        kept = ~np.isin(rows, np.array(sorted(self.refused), np.int64))
        first = np.zeros(len(rows), bool)
        first[np.unique(np.array(self.hashes, np.uint64), return_index=True)[1]] = True
        again = rows[kept & ~first]
        report.duplicates = len(again)
        if len(again):
            words = "an earlier row has this prompt too; data.filters.duplicates=drop leaves such rows out"
            error = DataError(f"{self.table.where(int(again[0]))}: {words}")
            if self._filtered(self.config.filters.duplicates, "duplicate", error):
                report.left_out["duplicate"] = len(again)
                kept &= first
        apart = np.array(self.apart, bool)
        train, held_out = rows[kept & ~apart], rows[kept & apart]
        report.prompts, report.held_out = len(train), len(held_out)
        return Screened(train, held_out, report)


def _error_of(act: Callable[[], object]) -> DataError | None:
    try:
        act()
    except DataError as error:
        return error
    return None


def screen(
    table: Table,
    reader: RowReader,
    writer: PromptWriter,
    config: DataConfig,
    *,
    answers: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Screened:
    """The rows of a table that prompts come from.

    answers: supervised steps will imitate them. say: gets a line every few seconds.
    Raises DataError, naming the row, for a wrong one where data.on_bad_line is "stop", for what a filter stops at, and
    where no prompt is left.
    """
    screened = _Screen(table, reader, writer, config, answers=answers, say=say)()
    if not len(screened.train) + len(screened.held_out):
        report = screened.report
        raise DataError(f"{table.place} holds no prompts" + (f": {report}" if report.rows else ""))
    return screened
