"""A set of questions, read and ready: the same ones whatever run asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.config.data import DataConfig
from pipeline.config.rewards import RewardConfig, what_lacks
from pipeline.config.sources import CurriculumConfig, SyntheticSource, asked_of
from pipeline.config.sources.evaluation import EvaluationSet
from pipeline.data.chat import DataError
from pipeline.data.prompts import PromptSource
from pipeline.engine.sampling import Sampling
from pipeline.rewards.given import Given, given_by
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEED = 0  # not the run's: two runs are measured on the same questions, in the same order


@dataclass(frozen=True)
class OpenedSet:
    """A set.

    prompts:   its questions, numbered from 0.      sampling: how answers are drawn.
    rewards:   its verifiers.                       given: votes for majority@k, by the name of a source; of one whose
                                                    verifiers compare no answer there is none.
    """

    config: EvaluationSet
    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: tuple[RewardConfig, ...]
    given: Mapping[str, Given]
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
            _data(one, config.data, say),
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
        prompts, rewards = source.take(wanted), one.rewards or config.rewards
        for prompt in prompts:
            if config.environment is None and (why := what_lacks(rewards, prompt.source, prompt.metadata)) is not None:
                raise DataError(f"{prompt.origin}: the prompt {why}")
    except DataError as error:
        raise DataError(f"evaluate, {one.name}: {error}") from error
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
    votes = config.environment is None  # an environment compares no answers
    given = _given(rewards, {prompt.source for prompt in prompts}) if votes else {}
    best = config.checkpoint.best
    if not given and best is not None and best.score.startswith(f"eval/{one.name}/majority@"):
        raise DataError(
            f"checkpoint.best.score={best.score}: {best.score.rpartition('/')[2]} needs a verifier that compares an "
            "answer (exact_match, number, multiple_choice, math_verify, reasoning_gym); take another score"
        )
    return OpenedSet(one, prompts, sampling, rewards, given, source.tokenizer)


def _given(rewards: Sequence[RewardConfig], sources: Iterable[str]) -> dict[str, Given]:
    of_source = {name: given_by([reward for reward in rewards if reward.grades(name)]) for name in sources}
    return {name: given for name, given in of_source.items() if given is not None}


def _data(one: EvaluationSet, data: DataConfig, say: Callable[[str], None]) -> DataConfig:
    """A set's questions as the data of a run, in which no question comes earlier for having been solved."""
    if one.sources:
        own: dict[str, Any] = {"sources": one.sources, "chat": one.chat or data.chat, "filters": data.filters}
        return DataConfig(**own, on_bad_line=data.on_bad_line, max_prompt_tokens=data.max_prompt_tokens)
    held_out = tuple(source for source in data.origins if isinstance(source, SyntheticSource) or source.held_out)
    if held_out and (rest := [source for source in data.origins if source not in held_out]):
        say(f"evaluate, {one.name}: nothing is held out of {', '.join(asked_of(rest))}")
    sources = held_out or data.origins  # opened, a source that holds out nothing says what to set
    update = {"sources": sources, "path": None, "task": None, "chat": one.chat or data.chat}
    return data.model_copy(update=update | {"curriculum": CurriculumConfig()})  # pyright: ignore[reportCallIssue]
