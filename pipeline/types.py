"""What flows through the loop: a prompt, the episodes that answer it, the group they form.

    Batch (pipeline/step.py) -> Group (one prompt) -> Episode (one reward, or failed) -> Rollout(s)

A single-turn answer is an episode of one rollout. A rollout is checked when it is made, and nowhere again.
All arrays are numpy, so that they travel between processes without a copy of their own serialisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_ext.batch.routes import Routed, check_routes
from pipeline.arrays import stack_kept
from pipeline.stored import Routes, StoredRoutes, join_routes
from pipeline.teaching.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from pipeline.rewards import Verdict

FinishReason = Literal["stop", "length", "abort", "time"]

LARGEST_LOGPROB = 1e-3
"""A log-prob may exceed 0 by rounding, and not by more."""


@dataclass(frozen=True)
class Opening:
    """What a conversation begins with, as its chat template is given it: messages, tools and other variables."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """One question.

    ids:      [prompt tokens] int32, as the model reads it (chat template applied).
    text:     the same, for people.
    metadata: what the verifier needs (the answer, the numbers, ...).
    index:    position in the data stream; a prompt drawn again has a new index.
    origin:   "source:row" or "task:entry", the same each time it is drawn; "" where it is of no source.
    opening:  what the chat template made `ids` of; None: not known, as in a dump.
    """

    ids: np.ndarray
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    origin: str = ""
    opening: Opening | None = None

    @property
    def source(self) -> str:
        """The name before the last colon of `origin`."""
        return self.origin.rpartition(":")[0]


@dataclass(frozen=True)
class Sampled:
    """What one request sampled: M tokens, and what came back with them.

    ids: [M] int32.  logprobs: [M] float32.  weight_versions: [M] int32.  kept: [M, K] int32 or None; all as in Rollout.
    routes: [rows, layers, topk] of the input tokens that had no row before this request, or None. mixed_kv: as there.
    server: number of the fleet's server that sampled it, or None.  seconds: that it took, waiting included.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    routes: Routes | None
    weight_versions: np.ndarray
    finish_reason: FinishReason
    kept: np.ndarray | None = None
    retractions: int = 0
    mixed_kv: np.ndarray | None = None
    server: int | None = None
    seconds: float = 0.0


_INT32 = (np.dtype(np.int32),)
_BOOL = (np.dtype(bool),)
_ARRAYS: dict[str, tuple[tuple[np.dtype, ...], int]] = {
    "prompt_ids": (_INT32, 1),
    "response_ids": (_INT32, 1),
    "rollout_logprobs": ((np.dtype(np.float32),), 1),
    "weight_versions": (_INT32, 1),
    "trained": (_BOOL, 1),
    "routes": ((np.dtype(np.uint8), np.dtype(np.int16)), 3),
    "kept": (_INT32, 2),
    "mixed_kv": (_BOOL, 1),
}
"""Dtypes and dimensions of what a rollout holds."""


@dataclass(frozen=True)
class Rollout:
    """One sequence that the policy sampled, all of it or parts of it, exactly as the rollout engine returned it.

    prompt_ids:       [P] int32, at least one: what stood there before the policy sampled first.
    response_ids:     [N] int32: everything after the prompt, the stop token included where there was one.
    rollout_logprobs: [N] float32, log mu(y_t | x, y_<t) at the sampling temperature, over the kept tokens if any.
    routes:           [P + N - 1, layers, topk] uint8 or int16: row t holds the experts chosen where token t was the
                      input. The last token was never an input, so it has no row. None: not asked for. Stored ones were
                      checked where they were decoded.
    weight_versions:  [N] int32, the version of the weights that sampled each token.
    finish_reason:    "stop" (a stop token), "length" (the limit), "abort" (interrupted; what is there is valid),
                      "time" (cut, because it got no further).
    trained:          [N] bool: which tokens the policy sampled, and so are trained on. The others (what a tool said)
                      have log-prob 0, version -1 and no kept set; they have routes, because the trainer reads them too.
                      Left out: all.
    kept:             [N, K] int32, the token ids that top-k, top-p and min-p left to the sampler, -1 behind them. None:
                      all of the vocabulary.
    retractions:      how often the server dropped this request's KV cache and computed it again. Routes stay those of
                      the passes that sampled (`engine/inside/interruptions.py`).
    mixed_kv:         [N] bool: tokens that were sampled over keys and values of older weights than their own version's,
                      after an interruption `in_place`. No forward pass of one set of weights has their log-probs.
                      None: no token.
    teacher:          what a teacher says of the N tokens; a continuation drops it. None: nobody asked.
    servers, seconds: numbers of the servers that sampled it, and what its requests took; no dump has them.

    Raises ValueError where these do not go together.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    routes: Routes | None
    weight_versions: np.ndarray
    finish_reason: FinishReason
    kept: np.ndarray | None = None
    retractions: int = 0
    trained: np.ndarray = None  # pyright: ignore[reportAssignmentType]  (set below: all)
    mixed_kv: np.ndarray | None = None
    teacher: TeacherScores | None = None
    servers: tuple[int, ...] = ()
    seconds: float = 0.0

    def __post_init__(self):
        if self.trained is None:
            object.__setattr__(self, "trained", np.ones(len(self.response_ids), bool))
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        """Messages are written where something is wrong only: a step makes thousands of rollouts."""
        count, prompt = len(self.response_ids), len(self.prompt_ids)
        _must(prompt > 0, "a rollout needs a prompt of at least one token")
        _must(self.teacher is None or len(self.teacher) == count, "a teacher's scores are of other tokens")
        lengths = {"prompt_ids": prompt, "routes": prompt + count - 1}
        for name, (dtypes, dimensions) in _ARRAYS.items():
            array, length = getattr(self, name), lengths.get(name, count)
            if array is None:
                continue
            if array.dtype not in dtypes:
                raise ValueError(f"{name} is {array.dtype}, not {' or '.join(map(str, dtypes))}")
            if len(array.shape) != dimensions:
                raise ValueError(f"{name} has shape {list(array.shape)}")
            if len(array) != length:
                raise ValueError(f"{name} has {len(array)} rows for {length} tokens")

    def _check_values(self) -> None:
        trained, logprobs, versions = self.trained, self.rollout_logprobs, self.weight_versions
        for name in ("prompt_ids", "response_ids", "routes"):
            array = getattr(self, name)
            if array is not None and not isinstance(array, StoredRoutes) and (least := array.min(initial=0)) < 0:
                raise ValueError(f"{name} holds {least}")
        largest = logprobs.max(initial=-np.inf) if np.isfinite(logprobs).all() else np.nan
        if not largest <= LARGEST_LOGPROB:  # NaN fails too
            raise ValueError(f"log-probs must be at most 0, got {largest}")
        _must((versions[trained] >= 0).all(), "a sampled token has no weight version")
        if not trained.all():
            _must((versions[~trained] == -1).all(), "a token that was not sampled has a weight version")
            _must((logprobs[~trained] == 0).all(), "a token that was not sampled has a log-prob")
        if self.mixed_kv is not None:
            _must(not self.mixed_kv[~trained].any(), "a token that was not sampled is marked mixed_kv")
        if self.kept is not None:
            _must(self.kept.min(initial=-1) >= -1, f"kept holds token {self.kept.min(initial=-1)}")
            own = (self.kept == self.response_ids[:, None]).sum(1)
            _must((own[trained] == 1).all(), "a sampled token is not among those that were kept for it")
            _must((self.kept[~trained] == -1).all(), "a token that was not sampled has a kept set")

    def check_model(self, model: Routed, vocab_size: int) -> None:
        """Raise ValueError where tokens or routes cannot be a model's."""
        for name in ("prompt_ids", "response_ids", "kept"):
            array = getattr(self, name)
            largest = -1 if array is None else array.max(initial=-1)
            _must(largest < vocab_size, f"{name} holds token {largest}, outside the model's vocabulary of {vocab_size}")
        if self.routes is not None:
            check_routes(np.asarray(self.routes), model)

    def __len__(self) -> int:
        """Tokens after the prompt, N."""
        return len(self.response_ids)

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that the policy sampled: what every mean, exponent and length penalty counts."""
        return int(self.trained.sum())

    @cached_property
    def turn_numbers(self) -> np.ndarray:
        """[N] int64: of each sampled token the number of its turn, from 0; -1 at the others. A turn is what the policy
        sampled with nobody else's token between, in however many requests."""
        begins = self.trained & ~np.concatenate([[False], self.trained])[: len(self.trained)]
        return np.where(self.trained, begins.cumsum() - 1, -1)

    @property
    def turns(self) -> int:
        return int(self.turn_numbers.max(initial=-1)) + 1

    def is_of(self, version: int) -> bool:
        """Whether every sampled token, and there is one, is of these weights alone."""
        own = self.weight_versions[self.trained] == version
        return self.trained_tokens > 0 and bool(own.all()) and self.mixed_kv is None

    @property
    def comparable(self) -> np.ndarray:
        """[N] bool: sampled tokens whose log-probs are those of one set of weights, so that a trainer that holds these
        has the same."""
        return self.trained if self.mixed_kv is None else self.trained & ~self.mixed_kv

    @property
    def token_ids(self) -> np.ndarray:
        """[P + N] int32."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @classmethod
    def begun(cls, prompt_ids: np.ndarray, first: Sampled) -> Rollout:
        """What one request sampled after a prompt [P] int32. first.routes: [P + M - 1, layers, topk] or None."""
        return cls(
            prompt_ids=prompt_ids,
            response_ids=first.ids,
            rollout_logprobs=first.logprobs,
            routes=first.routes,
            weight_versions=first.weight_versions,
            finish_reason=first.finish_reason,
            kept=first.kept,
            retractions=first.retractions,
            mixed_kv=first.mixed_kv,
            servers=() if first.server is None else (first.server,),
            seconds=first.seconds,
        )

    def extended(self, more: Sampled, between: np.ndarray | None = None) -> Rollout:
        """This rollout and what was sampled after it. Nothing that is here changes: the tokens keep the log-probs,
        versions and routes of the forward passes that sampled them, whatever recomputed them since.

        between: [A] int32, tokens that the policy did not sample and that stand before the new ones; None: none.
        more.routes: of the tokens from the last one here on, [A + M, layers, topk] for M new tokens; None where this
        rollout has none. Raises ValueError where that is not so.
        """
        between = np.empty(0, np.int32) if between is None else between
        added, sampled = len(between), len(more.ids)
        if (self.kept is None) != (more.kept is None):
            raise ValueError("a continuation is sampled from kept tokens where its beginning was, and only there")
        rows = None if more.routes is None else len(more.routes)
        if rows != (None if self.routes is None else added + sampled):
            raise ValueError(f"a continuation of {added + sampled} tokens brings as many route rows, not {rows}")

        def joined(own: np.ndarray | None, fill: Any, new: np.ndarray | None) -> np.ndarray | None:
            """own, `fill` for what was not sampled, new; None where neither has anything."""
            if own is None and new is None:
                return None
            own = np.full(len(self), fill) if own is None else own
            new = np.full(sampled, fill, own.dtype) if new is None else new
            return np.concatenate([own, np.full((added, *own.shape[1:]), fill, own.dtype), new])

        kept = None
        if self.kept is not None and more.kept is not None:
            kept = stack_kept([self.kept, np.full((added, 1), -1, np.int32), more.kept])
        return Rollout(
            prompt_ids=self.prompt_ids,
            response_ids=np.concatenate([self.response_ids, between, more.ids]),
            rollout_logprobs=_some(joined(self.rollout_logprobs, 0.0, more.logprobs)),
            routes=None if self.routes is None or more.routes is None else join_routes(self.routes, more.routes),
            weight_versions=_some(joined(self.weight_versions, -1, more.weight_versions)),
            finish_reason=more.finish_reason,
            kept=kept,
            retractions=self.retractions + more.retractions,
            trained=_some(joined(self.trained, False, np.ones(sampled, bool))),
            mixed_kv=joined(self.mixed_kv, False, more.mixed_kv),
            servers=self.servers if more.server in (None, *self.servers) else (*self.servers, more.server),
            seconds=self.seconds + more.seconds,
        )


def _some(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array


@dataclass(frozen=True)
class Episode:
    """One attempt at a prompt.

    rollouts: its sequences, at least one; several where a conversation could not be one growing sequence. Each sampled
              token is in exactly one of them.
    reward:   of the whole attempt; None until it is graded, and where grading failed.
    failure:  why there is no reward, where the verifier failed. Such an episode is no part of a baseline or a loss.
    parts:    what each component of the reward gave, before its weight; none of those that failed.
    grade_s:  seconds that grading took.
    answer:   the text of the last response, as the verifiers read it; None: nobody has made it.
    verdict:  what the environment that made it says of it; None: verifiers are asked.
    turn_rewards: of each turn in order, where the environment gives them; their sum is the reward. None: all of it is
              the last turn's.
    calls:    tools that each turn called: name, arguments, result. (): nobody says.  note: of the environment.
              parts, grade_s, answer, verdict, calls, note are of this process only: no dump and no checkpoint has them.
    """

    rollouts: tuple[Rollout, ...]
    reward: float | None = None
    failure: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    grade_s: float | None = None
    answer: str | None = None
    verdict: Verdict | None = None
    turn_rewards: tuple[float, ...] | None = None
    calls: Sequence[Sequence[tuple[str, str, str]]] = ()
    note: str = ""

    def __post_init__(self):
        _must(len(self.rollouts) > 0, "an episode has at least one rollout")
        _must(self.reward is None or self.failure is None, "an episode has a reward or a failure, not both")
        if self.turn_rewards is not None:
            told = len(self.turn_rewards)
            _must(told == self.turns, f"an episode of {self.turns} turns has {told} rewards of turns")

    @property
    def turns(self) -> int:
        """Of all its rollouts."""
        return sum(rollout.turns for rollout in self.rollouts)

    @property
    def turn_numbers(self) -> np.ndarray:
        """[N] int64: those of its rollouts, one behind the other, counted on."""
        before = np.cumsum([0, *(rollout.turns for rollout in self.rollouts)])
        numbers = [np.where(r.trained, r.turn_numbers + n, -1) for r, n in zip(self.rollouts, before, strict=False)]
        return np.concatenate(numbers)

    @property
    def graded(self) -> bool:
        """Whether the verifier has spoken, or failed."""
        return self.reward is not None or self.failure is not None

    @property
    def trained_tokens(self) -> int:
        """That the policy sampled, of all its rollouts."""
        return sum(rollout.trained_tokens for rollout in self.rollouts)

    @property
    def last(self) -> Rollout:
        """The rollout that its end is in: a single turn's only one."""
        return self.rollouts[-1]


@dataclass(frozen=True)
class Group:
    """The G episodes of one prompt."""

    prompt: Prompt
    episodes: tuple[Episode, ...]

    @classmethod
    def of_single_turns(cls, prompt: Prompt, rollouts: Sequence[Rollout]) -> Group:
        """A group whose episodes are one rollout each, not graded yet."""
        return cls(prompt, tuple(Episode((rollout,)) for rollout in rollouts))

    @property
    def rollouts(self) -> list[Rollout]:
        """Of all its episodes, in order."""
        return [rollout for episode in self.episodes for rollout in episode.rollouts]

    @property
    def graded(self) -> bool:
        return all(episode.graded for episode in self.episodes)

    @property
    def rewards(self) -> np.ndarray:
        """[episodes with a reward] float32."""
        return np.array([e.reward for e in self.episodes if e.reward is not None], np.float32)


@dataclass(frozen=True)
class Ended:
    """A graded group that no step trains on, and why: its rewards do not differ, or too little could be graded."""

    group: Group
    end: Literal["uninformative", "failed"]


def _must(holds: object, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
