"""Tasks that need no download: a generator of questions and their answers, without end.

Question `index` of a stream depends on (seed, stream, index) only. Whether a question belongs to training or is held
out is decided by a hash of the question itself, not by its index or the seed: a tenth of all questions is held out,
a draw of the wrong kind is drawn again, and so the two can never share a question, whatever is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.config.data import SyntheticTaskConfig
from pipeline.data.chat import answer_ids, user_prompt
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stream = Literal["train", "held_out", "supervised"]
_STREAMS: dict[Stream, int] = {"train": 0, "held_out": 1, "supervised": 2}
_HELD_OUT = 10  # one question in this many
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


@dataclass(frozen=True)
class SupervisedPair:
    """A prompt and the answer to imitate. answer_ids: [N] int32, the end-of-sequence token last."""

    prompt: Prompt
    answer_ids: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[P + N] int32, the prompt and the answer behind it."""
        return np.concatenate([self.prompt.ids, self.answer_ids])

    @property
    def prompt_length(self) -> int:
        """P, tokens."""
        return len(self.prompt.ids)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out tenth."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % _HELD_OUT == 0


class SyntheticTask:
    """A task's streams, tokenized for a model."""

    def __init__(self, config: SyntheticTaskConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        """seed: the run's. Prompts go through the tokenizer's chat template."""
        self.config, self.tokenizer, self.seed = config, tokenizer, seed

    def problem(self, index: int, stream: Stream = "train") -> tuple[str, str]:
        """Question and right answer at `index` of a stream.

        Raises ValueError where so few questions exist that the stream has none.
        """
        rng = self._rng(index, stream)
        for _ in range(_MAX_DRAWS):
            digits = int(rng.integers(self.config.min_digits, self.config.max_digits + 1))
            question, answer = GENERATORS[self.config.name](rng, digits)
            if is_held_out(question) == (stream == "held_out"):
                return question, answer
        raise ValueError(
            f"{self.config.name} with {self.config.min_digits} to {self.config.max_digits} digits has too few "
            f"questions for a {stream} stream; raise max_digits"
        )

    def prompt(self, index: int, stream: Stream = "train") -> Prompt:
        """The prompt at `index` of a stream; metadata: task, question, answer."""
        question, answer = self.problem(index, stream)
        said = self.config.question.replace("{question}", question)
        metadata = {"task": self.config.name, "question": question, "answer": answer}
        return user_prompt(self.tokenizer, said, metadata, index)

    def supervised(self, index: int) -> SupervisedPair:
        """The pair at `index` of the supervised stream, whose questions are of the training kind."""
        prompt = self.prompt(index, "supervised")
        text = list(prompt.metadata["answer"])
        rng = self._rng(index, "supervised", salt=1)
        wrong = rng.random(len(text)) < self.config.supervised_error_rate
        for i in np.flatnonzero(wrong):
            if text[i].isdigit():
                text[i] = str(rng.integers(0, 10))
        return SupervisedPair(prompt, answer_ids(self.tokenizer, "".join(text)))

    def _rng(self, index: int, stream: Stream, salt: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.seed, _STREAMS[stream], index, salt])
