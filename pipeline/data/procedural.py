"""Tasks of reasoning-gym as endless questions.

Entry `i` of a task is made from its parameters, a seed and `i` alone. reasoning-gym makes sets of a fixed size, and
seeds entry k of one with seed + k; the seeds of sets that follow each other here are therefore `SIZE` apart. What is
needed to make an entry again stands in a prompt's metadata, so that the task's own verifier can judge an answer in
another process, with the entry as it was.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config.sources import ReasoningGymSource
from pipeline.data.chat import Asked, DataError, PromptWriter
from pipeline.data.held_out import held_out_share
from pipeline.data.streams import Order, Stream

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

    from pipeline.data.pass_rates import PassRates
    from pipeline.data.tables.screen import Report

SIZE = 500
"""Entries of a set."""
_SETS = 4  # that are kept: of prompts, of supervised pairs, and those before them
_MOST_PASSED_OVER = 10_000
_SEEDS = 2**32  # what reasoning-gym's own wrapper takes seeds modulo


class GymQuestions:
    """One task."""

    size: int | None = None
    rates: PassRates | None = None
    report: Report | None = None

    def __init__(
        self, name: str, task: str, source: ReasoningGymSource, writer: PromptWriter, seed: int, stream: Stream
    ):
        """name: in metrics and messages. seed: the run's.

        Raises DataError where reasoning-gym has no such task, or the task no such parameters.
        """
        self.name, self.task, self.source, self.writer = name, task, source, writer
        self.parameters = {key: value for key, value in source.tasks[task].items() if key != "weight"}
        self.seed = seed
        self.stream: Stream = stream
        if stream == "held_out" and not source.held_out:
            raise DataError(f"{name} has no held_out prompts; set `held_out` of the source")
        self._made: dict[tuple[Order, int], dict[str, Any]] = {}
        self._sets: OrderedDict[int, ProceduralDataset] = OrderedDict()
        self._entry(0, "prompts")

    def due(self, position: int, order: Order) -> int:
        """Entries of the other stream are passed over."""
        share = self.source.held_out
        for ahead in range(position, position + _MOST_PASSED_OVER):
            apart = held_out_share(self._entry(ahead, order)["question"]) < share
            if apart == (self.stream == "held_out"):
                return ahead
        raise DataError(
            f"{self.name}: {_MOST_PASSED_OVER:,} questions in a row are not of the {self.stream} kind; it has too few "
            "different ones, so widen its parameters"
        )

    def asked(self, position: int, order: Order) -> Asked:
        """The entry at a position; metadata: task, question, answer if there is a single one, and how it is made."""
        entry = self._entry(position, order)
        question, answer = entry["question"], entry["answer"]
        answer = answer if isinstance(answer, str) else None
        made = {"seed": self._seed(position, order), "size": SIZE, "index": position % SIZE}
        metadata = {"task": self.task, "question": question} | ({} if answer is None else {"answer": answer})
        metadata |= {"reasoning_gym": made | {"parameters": self.parameters}} | self.source.metadata
        messages = [{"role": "user", "content": self.source.question.replace("{question}", question)}]
        return Asked(messages, answer, metadata, None, f"{self.name}, entry {position}", f"{self.name}:{position}")

    def again(self, place: int) -> Asked:
        """The entry at a position."""
        return self.asked(place, "prompts")

    def _entry(self, position: int, order: Order) -> dict[str, Any]:
        if (order, position) not in self._made:
            if len(self._made) >= 2 * SIZE:
                self._made.clear()
            self._made[order, position] = self._set(self._seed(position, order))[position % SIZE]
        return self._made[order, position]

    def _set(self, seed: int) -> ProceduralDataset:
        if seed not in self._sets:
            try:
                self._sets[seed] = gym_set(self.task, seed, self.parameters)
            except DataError as error:
                raise DataError(f"data.sources, {self.name}: {error}") from error
            if len(self._sets) > _SETS:
                self._sets.popitem(last=False)
        return self._sets[seed]

    def _seed(self, position: int, order: Order) -> int:
        words = f"{self.source.seed} {self.seed} {order}"
        first = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
        return (first + position // SIZE * SIZE) % _SEEDS


def gym_set(task: str, seed: int, parameters: Mapping[str, Any]) -> ProceduralDataset:
    """`SIZE` entries of a task. Raises DataError: no such task, or parameters that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib 2.4.0, when it is compiled
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    known = DATASETS[task][1].__dataclass_fields__.keys()
    if unknown := sorted(parameters.keys() - known):
        there = ", ".join(sorted(known - {"seed", "size"}))
        raise DataError(f"the task {task} has no parameter {unknown[0]!r}; it has {there}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=SIZE, **parameters)
    except (AssertionError, ValueError, TypeError) as error:
        raise DataError(f"the task {task} refuses {dict(parameters)}: {error}") from error
