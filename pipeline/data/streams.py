"""Questions by position: the rows of a table, epoch after epoch, or the entries of a generator, without end.

A position is a place in the order of a stream, and depends on the data and the seed only. Some positions are passed
over: `due` says which is the next that is asked.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from pipeline.config.sources import CurriculumConfig
from pipeline.data.chat import Asked, DataError, PromptWriter
from pipeline.data.pass_rates import PassRates
from pipeline.data.tables.row_reader import RowReader, Table
from pipeline.data.tables.screen import Report, Screened

Order = Literal["prompts", "supervised"]
"""Prompts that are sampled from, and pairs that are imitated, each in its own order."""
Stream = Literal["train", "held_out"]
"""What is trained on, and what never is."""
Part = Literal["train", "held_out", "evaluation"]
"""Of the sources; evaluation: the held-out part of those that have one, all rows of the others."""


class Questions(Protocol):
    """One source, or one task of it.

    size: how many there are before they begin again; None: endless. rates: of the rows; None where none come again.
    """

    name: str
    writer: PromptWriter
    size: int | None
    rates: PassRates | None
    report: Report | None

    def due(self, position: int, order: Order) -> int:
        """This position, or the first behind it that is asked. Raises DataError where none is."""
        ...

    def asked(self, position: int, order: Order) -> Asked:
        """Raises DataError, naming the row, for what cannot be read any more."""
        ...

    def again(self, place: int) -> Asked:
        """The question whose origin is "name:place"."""
        ...


class TableQuestions:
    """The rows of a table that passed the screen: each once an epoch, in another order each."""

    def __init__(
        self,
        table: Table,
        reader: RowReader,
        writer: PromptWriter,
        screened: Screened,
        curriculum: CurriculumConfig,
        *,
        stream: Stream,
        shuffle: bool,
        seed: int,
    ):
        """Raises DataError where the stream has no row."""
        self.name, self.table, self.reader, self.writer = reader.name, table, reader, writer
        self.rows = screened.train if stream == "train" else screened.held_out
        self.report: Report | None = screened.report
        if not len(self.rows):
            advice = "; set `held_out` of the source in data.sources" if stream == "held_out" else ""
            raise DataError(f"{self.name} has no {stream} prompts{advice}")
        self.size: int | None = len(self.rows)
        self.rates: PassRates | None = PassRates(curriculum, len(table), seed)
        self.shuffle, self.seed, self.curriculum = shuffle, seed, curriculum
        self._orders: dict[Order, tuple[int, np.ndarray]] = {}

    def due(self, position: int, order: Order) -> int:
        """What the curriculum passes over is not due; nothing is passed over where it is off, or imitated."""
        if order == "supervised" or not self.curriculum.active:
            return position
        assert self.rates is not None
        for ahead in range(position, position + 2 * len(self.rows)):
            if self.rates.asks(self._row(ahead, order), ahead // len(self.rows)):
                return ahead
        raise DataError(
            f"{self.name}: data.curriculum leaves none of {len(self.rows):,} prompts to be asked: they are solved, or "
            "outside the band; widen data.curriculum.band, raise its `outside`, or end the run here"
        )

    def asked(self, position: int, order: Order) -> Asked:
        """The row at a position; past the last one another epoch begins."""
        return self.again(self._row(position, order))

    def again(self, place: int) -> Asked:
        """The row of a number. Raises DataError where the table has no such row any more."""
        if place >= len(self.table):
            raise DataError(f"{self.table.place} has no row {place} any more")
        where = self.table.where(place)
        try:
            return self.reader(self.table.record(place), place, where)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _row(self, position: int, order: Order) -> int:
        epoch, place = divmod(position, len(self.rows))
        return int(self.rows[self._permutation(epoch, order)[place] if self.shuffle else place])

    def _permutation(self, epoch: int, order: Order) -> np.ndarray:
        known = self._orders.get(order)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, order == "supervised"])
            known = self._orders[order] = (epoch, rng.permutation(len(self.rows)))
        return known[1]
