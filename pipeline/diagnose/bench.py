"""Both engines on a bench: log-probs of the same tokens under any setting of the parts that can be exchanged."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from megatron_ext.config import Head
from megatron_ext.exchange import Exchange
from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config
from pipeline.config.replay import Replay
from pipeline.data.prompts import PromptSource
from pipeline.engine.fleet import Fleet
from pipeline.engine.sampling import Sampling
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.step import PolicyTokens
from pipeline.trainer.group import TrainerGroup, to_sample
from pipeline.types import Rollout

Routes = Literal["native", "rollout", "rescored"]
Server = Literal["sampled", "rescored", "resent"]


@dataclass(frozen=True)
class Setting:
    """One way to compute both engines' log-probs. None: as the run does.

    offset:      the server's value of token t is held against the trainer's of token t + offset.
    unmasked:    the trainer's log-probs are over the whole vocabulary, whatever the sampler kept.
    label_shift, temperature, head, rope_theta: of the trainer, see Exchange.
    routes:      that the trainer takes: its own, those that came with the rollouts, or those of the server's second
                 pass over the same tokens.
    server:      its log-probs: those that it sampled with; of one prefill of the whole sequence, at temperature 1; or
                 of such a prefill after the trainer's weights were sent again. The last two bring their own routes, and
                 the trainer is held against them at temperature 1.
    """

    offset: int = 0
    unmasked: bool = False
    label_shift: int = 0
    temperature: float | None = None
    head: Head | None = None
    rope_theta: float | None = None
    routes: Routes = "native"
    server: Server = "sampled"


@dataclass(frozen=True)
class Gap:
    """log pi_o - log mu under a setting.

    tokens:       [tokens] float64, nats, of all rollouts in turn; those that a shift left without a partner are absent.
    abs_logprob:  mean |.|, nats.  k3: mean of e^. - 1 - ., nats.
    """

    tokens: np.ndarray

    @property
    def abs_logprob(self) -> float:
        return float(np.abs(self.tokens).mean())

    @property
    def k3(self) -> float:
        with np.errstate(over="ignore"):
            return float((np.expm1(self.tokens) - self.tokens).mean())


class Engines(Protocol):
    """What a diagnosis asks of a run: both engines, as `pipeline.loop.loop.Loop` holds them."""

    config: Config
    shape: ModelDescription
    source: PromptSource
    fleet: Fleet
    trainers: TrainerGroup
    sampling: Sampling

    @property
    def replay(self) -> Replay: ...
    def sync(self) -> None: ...


_PASSES = 60
"""Of the trainer, that exchanging every part alone takes at most; two fits have most of them."""


class Bench:
    """Rollouts between the two engines. Every measurement is made once.

    Measuring with server="resent" sends the trainer's weights anew; all else leaves both engines as they are.
    """

    def __init__(self, loop: Engines, rollouts: Sequence[Rollout]):
        """rollouts: at least one, none without a response."""
        self.loop, self.rollouts = loop, list(rollouts)
        self._loaded: tuple[str, bool] | None = None
        self._scored: dict[Server, tuple[list[np.ndarray], list[np.ndarray] | None]] = {}
        self._trainer: dict[Any, PolicyTokens] = {}

    @property
    def has_routes(self) -> bool:
        """Whether the rollouts came with routes that the trainer can take."""
        return self.loop.config.replay.any and all(r.routes is not None for r in self.rollouts)

    @property
    def has_mask(self) -> bool:
        """Whether the sampler kept some tokens only, and says which."""
        return any(r.kept is not None for r in self.rollouts)

    @property
    def can_score(self) -> bool:
        """Whether there is a server to ask."""
        return self.loop.fleet.serves

    def far(self) -> tuple[float, float, str] | None:
        """How many of the trainer's passes are made, of about how many."""
        return len(self._trainer), max(_PASSES, len(self._trainer)), "passes"

    def gap(self, setting: Setting) -> Gap:
        """The difference of the engines on every response token."""
        parts = []
        for pi, mu in zip(self.trainer(setting).logprobs, self.server(setting.server), strict=True):
            n = len(mu)
            where = np.arange(n) + setting.offset
            inside = (where >= 0) & (where < n)
            inside &= np.arange(n) + setting.label_shift < n
            parts.append(pi[where[inside]].astype(np.float64) - mu[inside])
        return Gap(np.concatenate(parts))

    def trainer(self, setting: Setting) -> PolicyTokens:
        """What the trainer says of every response token."""
        temperature = setting.temperature if setting.server == "sampled" else 1.0
        exchange = Exchange(setting.label_shift, temperature, setting.head, setting.rope_theta)
        routes: str = setting.routes
        if routes == "rollout" and setting.server != "sampled":
            routes = setting.server
        masked = self.has_mask and not setting.unmasked and setting.server == "sampled"
        key = exchange, routes, masked
        if key not in self._trainer:
            self._load(routes, masked)
            routing = "native" if routes == "native" else "replay"
            self._trainer[key] = self.loop.trainers.logprobs(routing, exchange=exchange)
        return self._trainer[key]

    def server(self, kind: Server) -> list[np.ndarray]:
        """[N] float32 a rollout, nats."""
        return [r.rollout_logprobs for r in self.rollouts] if kind == "sampled" else self._score(kind)[0]

    def agreement(self) -> np.ndarray | None:
        """[layers]: share of tokens whose replayed experts the trainer would have chosen itself; nan for a dense layer.
        None without routes."""
        if not self.has_routes:
            return None
        replayed, agreed = self.trainer(Setting(routes="rollout")).routing[:, :2].astype(np.float64).T
        return np.divide(agreed, replayed, out=np.full(len(replayed), np.nan), where=replayed > 0)

    def _load(self, routes: str, masked: bool) -> None:
        if self._loaded != (routes, masked):
            samples = [to_sample(r) for r in self.rollouts]
            if not masked:
                samples = [replace(s, kept=None) for s in samples]
            if routes in ("rescored", "resent"):
                found = self._score("rescored" if routes == "rescored" else "resent")[1]
                assert found is not None
                samples = [replace(s, routes=rows) for s, rows in zip(samples, found, strict=True)]
            self.loop.trainers.load(samples)
            self._loaded = routes, masked

    def _score(self, kind: Server) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """The server's log-probs and routes of the whole sequences, by prefill."""
        if kind not in self._scored:
            fleet = self.loop.fleet
            if kind == "resent":
                self._score("rescored")  # what it says now is gone afterwards
                self.loop.sync()

            async def score() -> list[tuple[np.ndarray, Any]]:
                async with fleet:
                    return await asyncio.gather(*(fleet.score(r.token_ids) for r in self.rollouts))

            answers = asyncio.run(score())
            logprobs = [row[-len(r) :] for (row, _), r in zip(answers, self.rollouts, strict=True)]
            routes = [np.asarray(rows) for _, rows in answers if rows is not None]
            self._scored[kind] = logprobs, routes if len(routes) == len(self.rollouts) else None
        return self._scored[kind]


def new_rollouts(loop: Engines, count: int, max_new_tokens: int | None = None) -> list[Rollout]:
    """About `count` rollouts of the next prompts, two each, without moving on in the data.

    max_new_tokens: a limit below the run's own.
    """
    sampling = loop.sampling
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, max_new_tokens))
    groups = sample_groups_sync(loop.fleet, loop.source.peek(math.ceil(count / 2)), 2, sampling)
    return [r for g in groups for r in g.rollouts]
