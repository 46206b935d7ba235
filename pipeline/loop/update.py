"""One step's update: advantages over the whole batch, then one optimizer step a mini-batch of whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.arrays import padded
from pipeline.config import Config
from pipeline.config.replay import Replay
from pipeline.errors import SamerouteError
from pipeline.loop.compare import compare
from pipeline.objectives import (
    Denominators,
    Objective,
    ObjectiveConfig,
    Turns,
    is_informative,
    overlong_penalty,
)
from pipeline.objectives.terms.kl import kl_estimate
from pipeline.objectives.terms.second_moment import kept_tokens
from pipeline.observe.metrics import Timer, routing_metrics
from pipeline.step import Batch, PolicyTokens, StepResult
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.trainer.losses import ON_POLICY, LossRow
from pipeline.trainer.spikes import GradientSpikes
from pipeline.types import Episode, Group, Rollout


class NotFiniteError(SamerouteError):
    """What a model beside the policy says of a batch is not finite; the message names the model."""


class Trainers(Protocol):
    """What of a TrainerGroup an update asks for."""

    def logprobs(self) -> PolicyTokens: ...
    def record_routes(self, layers: int, num_experts: int) -> PolicyTokens: ...
    def reference_logprobs(self) -> list[np.ndarray]: ...
    def teacher_logprobs(self) -> list[np.ndarray]: ...
    def values(self) -> list[np.ndarray]: ...
    def update_policy(
        self,
        objective: ObjectiveConfig,
        denominators: Denominators,
        rows: dict[int, LossRow],
        skip_above: float = ...,
    ) -> tuple[dict[str, float], PolicyTokens]: ...
    def update_critic(
        self, objective: ObjectiveConfig, denominators: Denominators, rows: dict[int, LossRow]
    ) -> dict[str, float]: ...


@dataclass(frozen=True)
class Measured:
    """What is known of the batch before its first optimizer step, [N] float32 a rollout.

    proximal: None where the first mini-batch is the whole update: then pi is pi_o, and no pass is spent on it.
    reference, values: None where the objective asks for none. teacher: its scores, of each rollout.
    """

    proximal: PolicyTokens | None
    reference: list[np.ndarray] | None = None
    values: list[np.ndarray] | None = None
    teacher: list[TeacherScores] | None = None


@dataclass
class Update:
    """How a step trains.

    trainers: hold the batch's rollouts. model: a description with num_layers and num_experts. replay: of this model.
    spikes: which updates are not made.
    """

    config: Config
    objective: Objective
    trainers: Trainers
    model: Any
    replay: Replay
    spikes: GradientSpikes

    def __call__(self, batch: Batch, timer: Timer) -> StepResult:
        """Train on a batch. Raises DisagreementError where its rollouts are not of the trainer's weights, and
        NotFiniteError, see `measure`.

        With one mini-batch the policy of the update is the proximal one, so that no forward pass of its own is spent
        on pi_o unless something else reads it; the comparison with mu is then made after the step, and stops the run
        all the same.
        """
        metrics: dict[str, float] = {}
        with timer("logprob"):
            measured = self.measure(batch)
        if measured.proximal is not None:
            metrics |= self.compare(batch, measured.proximal)
        if self.objective.kl_in_reward:
            metrics["kl/reference"] = mean_kl(self.objective, batch, measured)
        if self.objective.composition.teacher_advantage:
            metrics["teacher/kl"] = mean_teacher_kl(batch, measured)
        if (bound := self.objective.composition.second_moment) is not None:
            metrics["correction/second_moment_cut"] = share_dropped(bound, batch, measured)
        rows = loss_rows(self.objective, batch, measured, max_new_tokens=self.config.longest_rollout)
        parts, passes = [], []
        current: dict[int, np.ndarray] = {}
        proximal = measured.proximal
        for chosen in mini_batches(batch, self.config.train.mini_batches):
            part, seen = self.step(batch, {i: rows[i] for i in chosen})
            current |= dict(zip(chosen, seen.logprobs, strict=True))
            parts.append(part)
            passes.append(seen.routing)
            if proximal is None:
                metrics |= self.compare(batch, seen)
                proximal = seen
        assert proximal is not None
        # Under R3 agreement is the engines', at the proximal weights; under R2 it is the policy's own, as it moves.
        routing = proximal.routing if self.replay.from_server else np.sum(passes, 0)
        if self.model.num_experts:
            metrics |= routing_metrics(routing)
        metrics |= {n: float(np.mean([p[n] for p in parts if n in p])) for n in set().union(*parts)}
        return StepResult(
            metrics=metrics,
            batch=batch,
            proximal=PolicyTokens(proximal.logprobs, proximal.entropy, routing),
            current_logprobs=[current[i] for i in range(len(batch.rollouts))],
            advantages=[row.advantage for row in rows],
        )

    def measure(self, batch: Batch) -> Measured:
        """The passes before the first optimizer step that this objective and this replay ask for. Raises
        NotFiniteError for what the critic, the reference or the teacher says."""
        proximal = None
        if self.replay.from_proximal:
            proximal = self.trainers.record_routes(self.model.num_layers, self.model.num_experts)
        elif self.config.proximal_pass(self.replay):
            proximal = self.trainers.logprobs()
        reference = self.trainers.reference_logprobs() if self.objective.needs_reference else None
        values = self.trainers.values() if self.objective.needs_critic else None
        check_finite("log-probs of the reference", reference or ())
        check_finite("values of the critic", values or ())
        return Measured(
            proximal, reference, values, self.teacher(batch.rollouts) if self.objective.needs_teacher else None
        )

    def teacher(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """What the teacher says of each: the trainer's now, or what its servers have said. Raises NotFiniteError."""
        if self.config.teacher is not None and self.config.teacher.engine == "trainer":
            rows = self.trainers.teacher_logprobs()
            check_finite("log-probs of the teacher", rows)
            return [TeacherScores(row) for row in rows]
        return scores_of(rollouts)

    def compare(self, batch: Batch, proximal: PolicyTokens) -> dict[str, float]:
        """`compare` with this run's bound, under the weights that the batch began with."""
        return compare(
            batch.rollouts,
            proximal,
            version=batch.version,
            bound=self.config.logprob_bound,
            staleness=self.config.rollout.max_staleness,
        )

    def step(self, batch: Batch, rows: dict[int, LossRow]) -> tuple[dict[str, float], PolicyTokens]:
        """One optimizer step of the policy, and of the critic where there is one."""
        groups = batch.group_of_rollout
        denominators = Denominators(
            sequences=len(rows),
            tokens=sum(batch.rollouts[i].trained_tokens for i in rows),
            max_length=self.config.longest_rollout,
            prompts=len({int(groups[i]) for i in rows}),
        )
        metrics, seen = self.trainers.update_policy(self.config.objective, denominators, rows, self.spikes.limit)
        self.spikes.took(metrics)
        if self.objective.needs_critic:
            metrics |= self.trainers.update_critic(self.config.objective, denominators, rows)
        return metrics, seen


def check_finite(what: str, rows: Sequence[np.ndarray]) -> None:
    """rows: [N] a rollout. Raises NotFiniteError for numbers that are none."""
    wrong = sum(not np.isfinite(row).all() for row in rows)
    if wrong:
        raise NotFiniteError(f"{what} are not finite, in {wrong} of {len(rows)} rollouts; nothing is trained on them")


def mini_batches(batch: Batch, count: int) -> list[list[int]]:
    """Positions in batch.rollouts, dealt to `count` mini-batches of whole groups, group after group.

    A group without rewards has none, and takes no place; where fewer than `count` groups are left, so are mini-batches.
    """
    _, groups = np.unique(batch.group_of_rollout, return_inverse=True)
    dealt = [[int(i) for i in np.flatnonzero(groups % count == k)] for k in range(count)]
    return [mini_batch for mini_batch in dealt if mini_batch]


def loss_rows(objective: Objective, batch: Batch, measured: Measured, *, max_new_tokens: int) -> list[LossRow]:
    """What the loss reads of each of the batch's rollouts.

    Baselines are over episodes: an episode counts once, with the sampled tokens of all its rollouts, one rollout behind
    the other, whatever was cut into how many. max_new_tokens: the limit that the overlong penalty knows.
    Raises ValueError where the objective needs something that was not measured.
    """
    of_episode = [np.flatnonzero(batch.episode_of_rollout == e) for e in range(len(batch.episodes))]

    def joined(rows: Sequence[np.ndarray]) -> np.ndarray:
        """[episodes, longest], of [N] arrays by rollout."""
        return padded([np.concatenate([rows[i] for i in own]) for own in of_episode])

    def matrix(rows: Sequence[np.ndarray] | None) -> torch.Tensor | None:
        return None if rows is None else torch.from_numpy(joined(rows)).double()

    mask = torch.from_numpy(joined([r.trained for r in batch.rollouts]))
    rewards = torch.from_numpy(batch.rewards.astype(np.float64))
    penalty = torch.zeros_like(rewards)
    if ramp := round(objective.composition.overlong_fraction * max_new_tokens):
        penalty = overlong_penalty(mask.sum(-1), max_new_tokens, ramp).double()
    proximal = measured.proximal.logprobs if measured.proximal is not None else None
    out = objective.advantages(
        rewards + penalty,
        torch.from_numpy(batch.group_of_episode),
        mask,
        proximal_logprobs=matrix(proximal),
        reference_logprobs=matrix(measured.reference),
        rollout_logprobs=matrix([r.rollout_logprobs for r in batch.rollouts]),
        teacher_logprobs=matrix(None if measured.teacher is None else [s.logprobs for s in measured.teacher]),
        values=matrix(measured.values),
        turns=turns_of(batch.episodes, penalty) if objective.needs_turns else None,
    )
    of_group = np.bincount(batch.group_of_rollout, [r.trained_tokens for r in batch.rollouts])
    rows: list[LossRow] = []
    for episode, own in enumerate(of_episode):
        start = 0
        for i in own:
            rollout = batch.rollouts[i]
            where, start = slice(start, start + len(rollout)), start + len(rollout)
            advantage = out.advantages[episode].numpy()
            rows.append(
                LossRow(
                    rollout_logprobs=rollout.rollout_logprobs,
                    proximal_logprobs=ON_POLICY if proximal is None else proximal[i],
                    advantage=float(advantage) if advantage.ndim == 0 else advantage[where].astype(np.float32),
                    reference_logprobs=None if measured.reference is None else measured.reference[i],
                    teacher=measured.teacher[i] if measured.teacher and objective.composition.teacher_term else None,
                    returns=None if out.returns is None else out.returns[episode, where].numpy().astype(np.float32),
                    proximal_values=None if measured.values is None else measured.values[i],
                    prompt_tokens=int(of_group[batch.group_of_rollout[i]]) if objective.needs_prompt_tokens else None,
                )
            )
    return rows


def turns_of(episodes: Sequence[Episode], penalty: torch.Tensor) -> Turns:
    """Turns of graded episodes. penalty: [episodes], added to the reward of each one's last turn."""
    numbers = padded([episode.turn_numbers + 1 for episode in episodes]) - 1
    rewards = np.zeros((len(episodes), max(1, *(episode.turns for episode in episodes))))
    for row, episode, more in zip(rewards, episodes, penalty.tolist(), strict=True):
        if not episode.turns:
            continue
        if episode.turn_rewards is None:
            row[episode.turns - 1] = np.float32(episode.reward)
        else:
            row[: episode.turns] = np.asarray(episode.turn_rewards, np.float32)
        row[episode.turns - 1] += more
    return Turns(torch.from_numpy(numbers), torch.from_numpy(rewards))


def teaches(objective: Objective, group: Group) -> bool:
    """Whether the rewards of a group tell its answers apart; of turns too, where the objective reads them."""
    if is_informative(torch.from_numpy(group.rewards)):
        return True
    return objective.needs_turns and len({e.turn_rewards for e in group.episodes if e.reward is not None}) > 1


def mean_kl(objective: Objective, batch: Batch, measured: Measured) -> float:
    """The objective's estimate of KL(pi_o || pi_ref), mean over the tokens that were sampled, nats."""
    kl = objective.composition.kl
    assert kl is not None
    assert measured.proximal is not None
    assert measured.reference is not None
    sampled = np.concatenate([r.trained for r in batch.rollouts])
    log_ratio = np.concatenate(measured.reference) - np.concatenate(measured.proximal.logprobs)
    return float(kl_estimate(torch.from_numpy(log_ratio[sampled]).double(), kl.estimator).mean())


def mean_teacher_kl(batch: Batch, measured: Measured) -> float:
    """The mean of log pi_o - log pi_T over the tokens that were sampled, nats: KL(pi_o || pi_T), estimated."""
    assert measured.proximal is not None
    assert measured.teacher is not None
    rows = zip(measured.proximal.logprobs, measured.teacher, batch.rollouts, strict=True)
    return float(
        np.concatenate([(mine - theirs.logprobs)[r.trained] for mine, theirs, r in rows]).mean(dtype=np.float64)
    )


def scores_of(rollouts: Sequence[Rollout]) -> list[TeacherScores]:
    """What a teacher has said of each. Raises ValueError where it has not been asked."""
    scores = [rollout.teacher for rollout in rollouts if rollout.teacher is not None]
    if len(scores) != len(rollouts):
        raise ValueError(f"a teacher has scored {len(scores)} of {len(rollouts)} rollouts")
    return scores


def share_dropped(bound: float, batch: Batch, measured: Measured) -> float:
    """The share of a batch's sampled tokens that a bound on the second moment takes out of the gradient."""
    assert measured.proximal is not None
    sampled = torch.from_numpy(np.concatenate([r.trained for r in batch.rollouts]))[None]
    proximal, rollout = (
        torch.from_numpy(np.concatenate(rows))[None].double()
        for rows in (measured.proximal.logprobs, [r.rollout_logprobs for r in batch.rollouts])
    )
    kept = kept_tokens(proximal, rollout, sampled, bound)
    return 1 - float(kept.sum()) / max(1, int(sampled.sum()))
