"""Rewards of sampled groups, and what becomes of the answers that could not be graded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pipeline.rewards.protocol import KINDS, Question, Verdict
from pipeline.rewards.registry import RewardError
from pipeline.types import Episode, FinishReason, Group, Prompt, Rollout

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.rewards import OnFailure


class Asks(Protocol):
    """What grades, see `rollout.grading`."""

    def ask(self, answers: Iterable[tuple[Prompt, Episode]]) -> list[Verdict]: ...


@dataclass(frozen=True)
class Failures:
    """Answers of a step that a verifier failed on.

    answers:  how many were asked about.
    by_kind:  failures by their kind; protocol.py has the kinds.
    groups:   with failures, of which nothing is trained on.
    first:    what happened at the first of them.
    """

    answers: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    first: str = ""

    def __add__(self, other: Failures) -> Failures:
        return Failures(
            self.answers + other.answers,
            self.by_kind + other.by_kind,
            self.groups + other.groups,
            self.first or other.first,
        )

    def metrics(self) -> dict[str, float]:
        """Counts, of every kind."""
        counts = {f"reward/failures_{kind}": float(self.by_kind[kind]) for kind in KINDS}
        return {"reward/failed": float(self.by_kind.total()), "reward/groups_dropped": float(self.groups)} | counts

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.by_kind.most_common())
        return f"{self.by_kind.total()} of {self.answers} answers could not be graded ({kinds}); first: {self.first}"


def grade(
    groups: Sequence[Group], grading: Asks, *, on_failure: OnFailure = "exclude", least: int = 1
) -> tuple[list[Group], Failures]:
    """The same groups, every episode with its reward or with why it has none; and how many have none.

    on_failure: "exclude": a failed episode has no reward, and a group with failures needs `least` graded episodes (or
    all, where it has fewer), else none of its episodes has a reward. "drop_group": none has where one failed. "zero": a
    failed episode has reward 0.
    Episodes that come with a verdict are not asked about. Raises RewardError at the first failure where on_failure is
    "stop".
    """
    answers = ((g.prompt, episode) for g in groups for episode in g.episodes if episode.verdict is None)
    asked = iter(grading.ask(answers))
    out: list[Group] = []
    failures = Failures()
    for group in groups:
        own = [episode.verdict or next(asked) for episode in group.episodes]
        graded, failed = settle(group, own, on_failure=on_failure, least=least)
        out.append(graded)
        failures += failed
    return out, failures


def settle(
    group: Group, verdicts: Sequence[Verdict], *, on_failure: OnFailure = "exclude", least: int = 1
) -> tuple[Group, Failures]:
    """One group with its verdicts, one for each episode; else as `grade`."""
    episodes = []
    kinds: Counter[str] = Counter()
    first = ""
    for episode, verdict in zip(group.episodes, verdicts, strict=True):
        reason = ""
        if verdict.kind is not None:
            reason = _reason(verdict, group.prompt)
            if on_failure == "stop":
                raise RewardError(reason)
            kinds[verdict.kind] += 1
            first = first or reason
        episodes.append(_graded(episode, verdict, reason, zero=on_failure == "zero"))
    graded, lost = dataclasses.replace(group, episodes=tuple(episodes)), 0
    if first and on_failure != "zero":
        enough = min(least, len(episodes)) if on_failure == "exclude" else len(episodes)
        if len(graded.rewards) < max(1, enough):
            graded, lost = _without_rewards(graded, first), 1
    return graded, Failures(len(episodes), kinds, lost, first)


def question(prompt: Prompt, episode: Episode, tokenizer: PreTrainedTokenizerBase) -> Question:
    """What the verifiers are asked of an episode of a prompt."""
    last = episode.last
    return Question(
        prompt, response_text(last, tokenizer), last.response_ids, last.finish_reason, episode.trained_tokens
    )


def response_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    """See `text_of`."""
    return text_of(rollout.response_ids, rollout.finish_reason, tokenizer)


def text_of(ids: np.ndarray, finish_reason: FinishReason, tokenizer: PreTrainedTokenizerBase) -> str:
    """A response [N] without the stop token that ended it.

    Other special tokens stay: left out, "12<|user|>34" would read as the right answer 1234.
    """
    ids = ids[:-1] if finish_reason == "stop" else ids
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def _graded(episode: Episode, verdict: Verdict, reason: str, *, zero: bool) -> Episode:
    parts = {name: part.reward for name, part in verdict.parts.items() if part.reward is not None}
    reward, failure = verdict.reward, None
    if verdict.kind is not None:  # of an episode without tokens there is nothing that could have a reward
        reward, failure = (0.0, None) if zero and episode.trained_tokens else (None, reason)
    return dataclasses.replace(
        episode, parts=parts, grade_s=verdict.seconds, answer=verdict.response, reward=reward, failure=failure
    )


def _without_rewards(group: Group, why: str) -> Group:
    """A group of which nothing is trained on; each episode says why."""
    lost = f"left out, because too few answers of its group could be graded: {why}"
    episodes = (e if e.failure else dataclasses.replace(e, reward=None, failure=lost) for e in group.episodes)
    return dataclasses.replace(group, episodes=tuple(episodes))


def _reason(verdict: Verdict, prompt: Prompt) -> str:
    who = f"the verifier {verdict.verifier!r}" if verdict.verifier else "the environment"
    return (
        f"{who} {verdict.what}, on prompt {prompt.index} ({prompt.text[:200]!r}), response {verdict.response[:200]!r}"
    )
