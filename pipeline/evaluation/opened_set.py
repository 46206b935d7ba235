"""A set of questions, read and ready: the same ones whatever run asks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.config.data import DataConfig
from pipeline.config.rewards import RewardConfig
from pipeline.config.sources import CurriculumConfig
from pipeline.config.sources.evaluation import EvaluationSet
from pipeline.data.chat import DataError
from pipeline.data.prompts import PromptSource
from pipeline.engine.client import Sampling
from pipeline.rewards.given import Given, given_by
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEED = 0  # not the run's: two runs are measured on the same questions, in the same order


@dataclass(frozen=True)
class OpenedSet:
    """A set.

    prompts:   its questions, numbered from 0.      sampling: how answers are drawn.
    rewards:   its verifiers.                       given: votes for majority@k; None where no verifier compares.
    """

    config: EvaluationSet
    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: tuple[RewardConfig, ...]
    given: Given | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        return self.config.name

    def due(self, step: int, last: int) -> bool:
        """Whether it is evaluated after a step; 0: before the first. last: step of the run."""
        if step == 0:
            return self.config.at_start
        return step % self.config.every_steps == 0 or step == last


def open_sets(config: Config, model_path: Path, say: Callable[[str], None]) -> list[OpenedSet]:
    """Those of a configuration, every row read. model_path: whose tokenizer counts. say: hears of what was left out.

    Raises DataError, naming the set, for what cannot be asked.
    """
    return [_open(one, config, model_path, say) for one in config.evaluate]


def _open(one: EvaluationSet, config: Config, model_path: Path, say: Callable[[str], None]) -> OpenedSet:
    try:
        source = PromptSource(
            _data(one, config.data),
            model_path,
            seed=_SEED,
            part="evaluation" if one.sources else "held_out",
            trust_remote_code=config.model.trust_remote_code,
            say=lambda line: say(f"evaluate, {one.name}: {line}"),
        )
        size = source.size
        wanted = one.prompts if one.prompts is not None else size
        assert wanted is not None, "a generator says how many"  # EvaluationSet and Config see to it
        if size is not None and size < wanted:
            raise DataError(f"{wanted:,} questions are asked for, and there are {size:,}; lower `prompts`")
        prompts = source.take(wanted)
    except DataError as error:
        raise DataError(f"evaluate, {one.name}: {error}") from error
    rewards = one.rewards or config.rewards
    sampling = Sampling(
        max_new_tokens=one.max_new_tokens or config.rollout.max_new_tokens,
        temperature=config.precision.temperature if one.temperature is None else one.temperature,
        top_p=one.top_p,
        top_k=one.top_k,
        min_p=one.min_p,
        stop_token_ids=source.stop_token_ids,
        seed=_SEED if config.server.deterministic else None,
        with_routes=False,
    )
    given, best = given_by(rewards), config.checkpoint.best
    if given is None and best is not None and best.score.startswith(f"eval/{one.name}/majority@"):
        raise DataError(
            f"checkpoint.best.score={best.score}: {best.score.rpartition('/')[2]} needs a verifier that compares an "
            "answer (exact_match, number, multiple_choice, math_verify, reasoning_gym); take another score"
        )
    return OpenedSet(one, prompts, sampling, rewards, given, source.tokenizer)


def _data(one: EvaluationSet, data: DataConfig) -> DataConfig:
    """A set's questions as the data of a run, in which no question comes earlier for having been solved."""
    if not one.sources:
        chat = one.chat or data.chat
        return data.model_copy(update={"chat": chat, "curriculum": CurriculumConfig()})  # pyright: ignore[reportCallIssue]
    return DataConfig(
        sources=one.sources,
        chat=one.chat or data.chat,
        filters=data.filters,
        on_bad_line=data.on_bad_line,
        max_prompt_tokens=data.max_prompt_tokens,
    )  # pyright: ignore[reportCallIssue]
