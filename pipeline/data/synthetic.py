"""Tasks that need no download: a generator of questions and their answers, without end.

Question `index` of a stream depends on (seed, stream, index) only. Whether a question belongs to training or is held
out is decided by a hash of the question itself, not by its index or the seed: a tenth of all questions is held out,
a draw of the wrong kind is drawn again, and so the two can never share a question, whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.config.sources import SyntheticTaskConfig
from pipeline.data.chat import Asked, PromptWriter
from pipeline.data.held_out import held_out_share
from pipeline.data.streams import Order, Stream

if TYPE_CHECKING:
    from pipeline.data.pass_rates import PassRates
    from pipeline.data.tables.screen import Report

Draws = Literal["train", "held_out", "supervised"]
_DRAWS: dict[Draws, int] = {"train": 0, "held_out": 1, "supervised": 2}
_HELD_OUT = 0.1
_MAX_DRAWS = 10_000

Generator = Callable[[np.random.Generator, int], tuple[str, str]]
GENERATORS: dict[str, Generator] = {}


def register(name: str) -> Callable[[Generator], Generator]:
    """Add a generator: (random numbers, digits) -> (question, answer). Raises ValueError for a name that is taken."""

    def add(generator: Generator) -> Generator:
        if name in GENERATORS:
            raise ValueError(f"there is already a synthetic task {name!r}")
        GENERATORS[name] = generator
        return generator

    return add


@register("digit_sort")
def digit_sort(rng: np.random.Generator, digits: int) -> tuple[str, str]:
    """`digits` digits, to be written in ascending order: 3142 -> 1234."""
    drawn = rng.integers(0, 10, digits)
    return "".join(map(str, drawn)), "".join(map(str, np.sort(drawn)))


@register("addition")
def addition(rng: np.random.Generator, digits: int) -> tuple[str, str]:
    """The sum of two numbers of at most `digits` digits: 17+5 -> 22."""
    a, b = (int(n) for n in rng.integers(0, 10**digits, 2))
    return f"{a}+{b}", str(a + b)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out tenth."""
    return held_out_share(question) < _HELD_OUT


class SyntheticTask:
    """A task's questions, without end."""

    size: int | None = None
    rates: PassRates | None = None
    report: Report | None = None

    def __init__(
        self,
        config: SyntheticTaskConfig,
        writer: PromptWriter,
        seed: int = 0,
        *,
        stream: Stream = "train",
        name: str | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        """seed: the run's. name: in metrics and messages, the task's if left out. metadata: more of it."""
        self.config, self.writer, self.seed = config, writer, seed
        self.stream: Stream = stream
        self.name, self.metadata = name or config.name, metadata or {}

    def problem(self, index: int, draws: Draws = "train") -> tuple[str, str]:
        """Question and right answer at `index` of a stream.

        Raises ValueError where so few questions exist that the stream has none.
        """
        rng = self._rng(index, draws)
        for _ in range(_MAX_DRAWS):
            digits = int(rng.integers(self.config.min_digits, self.config.max_digits + 1))
            question, answer = GENERATORS[self.config.name](rng, digits)
            if is_held_out(question) == (draws == "held_out"):
                return question, answer
        raise ValueError(
            f"{self.config.name} with {self.config.min_digits} to {self.config.max_digits} digits has too few "
            f"questions for a {draws} stream; raise max_digits"
        )

    def due(self, position: int, order: Order) -> int:
        """Every position is."""
        return position

    def asked(self, position: int, order: Order) -> Asked:
        """The question at a position; metadata: task, question, answer. An answer to imitate may have wrong digits, and
        its question is of the training kind."""
        question, answer = self.problem(position, order if order == "supervised" else self.stream)
        said = self.config.question.replace("{question}", question)
        metadata = {"task": self.config.name, "question": question, "answer": answer} | self.metadata
        if order == "supervised":
            answer = self._imperfect(position, answer)
        where = f"{self.name}, question {position}"
        return Asked([{"role": "user", "content": said}], answer, metadata, None, where, f"{self.name}:{position}")

    def again(self, place: int) -> Asked:
        """The question at a position."""
        return self.asked(place, "prompts")

    def _imperfect(self, index: int, answer: str) -> str:
        text = list(answer)
        rng = self._rng(index, "supervised", salt=1)
        wrong = rng.random(len(text)) < self.config.supervised_error_rate
        for i in np.flatnonzero(wrong):
            if text[i].isdigit():
                text[i] = str(rng.integers(0, 10))
        return "".join(text)

    def _rng(self, index: int, draws: Draws, salt: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.seed, _DRAWS[draws], index, salt])
