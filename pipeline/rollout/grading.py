"""What grades answers: a grader, and a tokenizer that reads them for it. Here is the one of this process.

`remote_grading` has one whose processes run beside the servers; whoever asks sees no difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, Self

from pipeline.rewards import Asking, Grader, Verdict, open_grader, question
from pipeline.types import Episode, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.rewards import GradingConfig, RewardConfig


class Judge(Protocol):
    """Answers one by one, on an event loop: each gets its verdict while others are asked or graded. An async context;
    what is still open when it ends is cancelled."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def ask(self, prompt: Prompt, episode: Episode) -> Verdict:
        """Of all components together. Raises VerifierError where one cannot be loaded, RewardError where what grades
        dies again and again."""
        ...


class Grading(Protocol):
    """Grades answers. One call or one judge at a time."""

    def ask(self, answers: Iterable[tuple[Prompt, Episode]]) -> list[Verdict]:
        """A verdict for each, in order. Raises as Judge.ask."""
        ...

    def judge(self) -> Judge:
        """For one event loop."""
        ...


class Graders(Protocol):
    """Where answers are graded."""

    def open(self, rewards: Sequence[RewardConfig], grading: GradingConfig) -> AbstractContextManager[Grading]:
        """The grader of a configuration. It starts at once and does not wait; nothing of it is left when it ends."""
        ...


class OwnGraders:
    """In children of this process. tokenizer: of the answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    @contextlib.contextmanager
    def open(self, rewards: Sequence[RewardConfig], grading: GradingConfig) -> Iterator[OwnGrading]:
        """As Graders.open."""
        with open_grader(rewards, grading) as grader:
            yield OwnGrading(grader, self._tokenizer)


class OwnGrading:
    """By a grader of this process."""

    def __init__(self, grader: Grader, tokenizer: PreTrainedTokenizerBase):
        self._grader, self._tokenizer = grader, tokenizer

    def ask(self, answers: Iterable[tuple[Prompt, Episode]]) -> list[Verdict]:
        """As Grading.ask; answers are graded while later ones are read."""
        return self._grader.ask(question(prompt, episode, self._tokenizer) for prompt, episode in answers)

    def judge(self) -> OwnJudge:
        """As Grading.judge."""
        return OwnJudge(self._grader, self._tokenizer)


class OwnJudge:
    """See Judge."""

    def __init__(self, grader: Grader, tokenizer: PreTrainedTokenizerBase):
        self._asking, self._tokenizer = Asking(grader), tokenizer

    async def __aenter__(self) -> Self:
        await self._asking.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._asking.__aexit__(*details)

    async def ask(self, prompt: Prompt, episode: Episode) -> Verdict:
        """As Judge.ask."""
        return await self._asking.ask(question(prompt, episode, self._tokenizer))
