"""A grader process: a Ray actor beside the servers that reads answers, and whose children grade them.

It is told token ids and says verdicts; the text is made here. What its verifiers find around them, and the limits that
they have, are those of a grader of the controller.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.pretrained import load_tokenizer
from pipeline.errors import SamerouteError
from pipeline.rewards import Asking, Question, RewardError, Verdict, VerifierError, open_grader, text_of
from pipeline.rewards.grader import Surroundings
from pipeline.rewards.registry import describe
from pipeline.types import Episode, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.rewards import GradingConfig, RewardConfig

_GATHER_S = 0.002
"""Verdicts of so many seconds travel together."""

Said = tuple[int, Verdict | SamerouteError]
"""Number of an answer, and its verdict or why it has none."""


def pack_answer(number: int, prompt: Prompt, episode: Episode) -> bytes:
    """An answer as it travels: plain values, four bytes a token."""
    last, trained = episode.last, sum(rollout.trained_tokens for rollout in episode.rollouts)
    asked = (prompt.ids.tobytes(), prompt.text, prompt.metadata, prompt.index, prompt.origin)
    answered = (last.response_ids.tobytes(), last.finish_reason, trained)
    return pickle.dumps((number, asked, answered), pickle.HIGHEST_PROTOCOL)


class _Open:
    """A grader that answers are sent to, on the actor's event loop."""

    def __init__(self, asking: Asking, tokenizer: PreTrainedTokenizerBase):
        self.asking, self._tokenizer = asking, tokenizer
        self._said: list[Said] = []
        self._changed = asyncio.Event()
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def grade(self, packed: bytes) -> None:
        """Its verdict will be among those that `said` brings."""
        task = asyncio.create_task(self._graded(packed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _graded(self, packed: bytes) -> None:
        number, (prompt_ids, text, metadata, index, origin), (ids, finish_reason, trained) = pickle.loads(packed)
        response = np.frombuffer(ids, np.int32)
        prompt = Prompt(np.frombuffer(prompt_ids, np.int32), text, metadata, index, origin)
        try:
            read = text_of(response, finish_reason, self._tokenizer)
            said = await self.asking.ask(Question(prompt, read, response, finish_reason, trained))
        except SamerouteError as error:
            said = error
        except Exception as error:  # a mistake of ours: else who asked would wait for ever
            said = RewardError(f"an answer to prompt {index} cannot be graded beside the servers: {describe(error)}")
        self._said.append((number, said))
        self._changed.set()

    async def said(self) -> list[Said]:
        """What is new, as soon as there is something; nothing where this is called again meanwhile."""
        self._turn = turn = self._turn + 1
        self._changed.set()  # whoever waited before gives up
        while turn == self._turn:
            if self._said:
                await asyncio.sleep(_GATHER_S)
                if turn == self._turn:
                    said, self._said = self._said, []
                    return said
            else:
                self._changed.clear()
                await self._changed.wait()
        return []


class GraderProcess:
    """Runs in the actor. model_path: whose tokenizer reads the answers; trust_remote_code: as ModelConfig has it."""

    def __init__(self, model_path: Path, trust_remote_code: bool):
        self._model_path, self._trust = model_path, trust_remote_code
        self._graders: dict[int, asyncio.Future[_Open]] = {}
        self._tokenizer: asyncio.Task[PreTrainedTokenizerBase] | None = None

    async def open(
        self, key: int, rewards: Sequence[RewardConfig], grading: GradingConfig, surroundings: Surroundings
    ) -> None:
        """Start a grader; `exchange` waits for it, and raises why there is none."""
        grader = self._grader(key)
        try:
            grader.set_result(await self._opened(rewards, grading, surroundings))
        except Exception as error:  # whoever exchanges raises it
            grader.set_exception(error)

    def _grader(self, key: int) -> asyncio.Future[_Open]:
        """Calls of an actor need not begin in the order in which they were made: it may come later."""
        return self._graders.setdefault(key, asyncio.get_running_loop().create_future())

    async def _opened(
        self, rewards: Sequence[RewardConfig], grading: GradingConfig, surroundings: Surroundings
    ) -> _Open:
        if self._tokenizer is None:
            load = asyncio.to_thread(load_tokenizer, self._model_path, trust_remote_code=self._trust)
            self._tokenizer = asyncio.create_task(load)
        if not Path(surroundings.folder).is_dir():
            raise VerifierError(
                f"{surroundings.folder}, where the run was started, is no folder on the node that grades; start it in "
                "one that every node sees, or set rollout.samplers=0"
            )
        grader = open_grader(rewards, grading, surroundings).__enter__()
        try:
            tokenizer = await self._tokenizer
        except BaseException:
            grader.close()
            raise
        return _Open(await Asking(grader).__aenter__(), tokenizer)

    async def exchange(self, key: int, packed: Sequence[bytes]) -> list[Said]:
        """Take answers to grade, and bring verdicts, of these or earlier ones, as soon as there are some; see
        `_Open.said`. packed: by `pack_answer`."""
        own = await asyncio.shield(self._grader(key))
        for answer in packed:
            own.grade(answer)
        return await own.said()

    async def lives(self) -> None:
        """Answered at once, while answers are graded."""

    async def close(self, key: int) -> None:
        """End a grader and all that its verifiers started."""
        try:
            own = await self._grader(key)
        except Exception:  # there is none, and who asked has heard why
            return
        await own.asking.__aexit__()
        await asyncio.to_thread(own.asking.grader.close)
