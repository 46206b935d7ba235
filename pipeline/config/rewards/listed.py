"""`rewards` as a person writes it, in short or in full, and how answers are graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from megatron_ext.config import Frozen
from pipeline.config.rewards.verifiers import (
    CodeReward,
    ExactMatchReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    MathVerifyReward,
    MultipleChoiceReward,
    NumberReward,
    ReasoningGymReward,
    RegexReward,
    Reward,
    RewardModelReward,
)
from pipeline.text.named import is_among

OnFailure = Literal["exclude", "zero", "drop_group", "stop"]
"""What becomes of an answer that a verifier failed on."""

_OF_WORKER_GB = 0.5
"""Of the process that watches a program."""

_TAKEN = {"mean", "std", "failed", "groups_dropped", "uninformative_groups"}
"""Metrics that a component would hide."""


class GradingConfig(Frozen):
    """How verifiers are run, and what becomes of answers that one fails on."""

    workers: int = Field(
        8,
        ge=1,
        description="processes that grade, so many answers at a time, on each node that has samplers where there are "
        "any (rollout.samplers); one where all verifiers are quick",
    )
    timeout_s: float = Field(30.0, gt=0, description="a verifier that takes longer on one answer is killed")
    memory_gb: float = Field(
        4.0, gt=0, description="resident memory of a verifier and what it starts, 1e9 bytes; with more it is killed"
    )
    on_failure: OnFailure = Field(
        "exclude",
        description="an answer that a verifier hangs on, crashes on or has no number for. exclude: it is in no "
        "baseline and no loss, and its group stays if two are left; zero: it has reward 0; drop_group: nor are the "
        "others of its group; stop: the run ends",
    )
    environment: tuple[str, ...] = Field(
        (), description="variables that verifiers get though their names look like secrets"
    )


RewardConfig = Annotated[
    ExactMatchReward
    | NumberReward
    | MultipleChoiceReward
    | RegexReward
    | MathVerifyReward
    | ReasoningGymReward
    | CodeReward
    | RewardModelReward
    | JudgeReward
    | LengthReward
    | FunctionReward,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[Reward]] = {
    get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(get_args(RewardConfig)[0])
}
"""Kind of verifier -> what it is told."""


def _long_form(value: Any) -> Any:
    """A list of mappings with a kind: a text is a kind, or a function; one that is alone needs no list."""
    if isinstance(value, str | dict | Reward):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"a list of verifiers, not {value!r}; write rewards=[exact_match]")
    return [_item(item) for item in value]


def _item(item: Any) -> Any:
    if isinstance(item, str):
        item = {"kind": "function", "function": item} if ":" in item else {"kind": item}
    if isinstance(item, Reward):
        return item
    if not isinstance(item, dict):
        raise ValueError(f"a verifier is a kind, package.module:function, or a mapping with a kind, not {item!r}")
    if "kind" not in item and "function" in item:
        item = {"kind": "function", **item}
    if (kind := item.get("kind")) not in KINDS:
        there = ", ".join(sorted(KINDS))
        raise ValueError(
            f"there is no verifier {kind!r}; there are {there}, or write your own as package.module:function"
        )
    return item


def hides_another(name: str) -> bool:
    """Whether a component of this name would have the place of one of the run's own metrics."""
    return name in _TAKEN or name.startswith("failures_")


def _check(rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
    if not rewards:
        raise ValueError("a run needs one verifier at least; write rewards=[exact_match]")
    names = [reward.metric for reward in rewards]
    for name in names:
        if hides_another(name):
            raise ValueError(f"the metric reward/{name} is another one; give this verifier another name")
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} verifiers have the name {name!r}; give each a name of its own")
    return rewards


def check_memory(rewards: tuple[Reward, ...], grading: GradingConfig) -> None:
    """Raise ValueError where a program may take more memory than its verifier, which would be killed in its place."""
    for reward in rewards:
        if isinstance(reward, CodeReward) and reward.sandbox.memory_mb / 1000 + _OF_WORKER_GB > grading.memory_gb:
            least = reward.sandbox.memory_mb / 1000 + _OF_WORKER_GB
            raise ValueError(
                f"a program's sandbox.memory_mb={reward.sandbox.memory_mb} does not fit grading.memory_gb="
                f"{grading.memory_gb:g} of its verifier; set that to {least:g} or more"
            )


def what_lacks(rewards: Sequence[Reward], source: str, metadata: Mapping[str, Any]) -> str | None:
    """What the verifiers of a source would miss of one of its prompts, in words; None for nothing."""
    for reward in rewards:
        if reward.grades(source) and (key := reward.lacks(metadata)) is not None:
            return (
                f'has no "{key}", which the verifier {reward.metric} reads; it has {", ".join(metadata) or "nothing"}'
            )
    return None


def check_sources(rewards: Sequence[Reward], there: Sequence[str], asked: Sequence[str]) -> None:
    """Raise ValueError where a verifier names a source that is not there, or a source has no verifier.

    there: sources that may be named. asked: those whose prompts are graded.
    """
    for reward in rewards:
        for name in reward.sources:
            if not any(is_among(source, (name,)) for source in there):
                raise ValueError(
                    f"the verifier {reward.metric} names the source {name!r}; there are {', '.join(there)}"
                )
    for source in asked:
        if not any(reward.grades(source) for reward in rewards):
            raise ValueError(f"no verifier grades the source {source!r}; name it under `sources` of one of them")


MOVED = {
    "data.reward": "rewards",
    "data.reward_workers": "grading.workers",
    "data.reward_timeout_s": "grading.timeout_s",
    "data.reward_memory_gb": "grading.memory_gb",
    "data.reward_environment": "grading.environment",
    "data.reward_directory": "rewards=[{function: MODULE:NAME, directory: FOLDER}]",
    "data.on_reward_failure": "grading.on_failure",
}
"""Fields of an earlier version -> what is written now."""

Rewards = Annotated[tuple[RewardConfig, ...], BeforeValidator(_long_form), AfterValidator(_check)]
"""The verifiers of a run."""
