"""The loop. Read `Loop.step` first: sample -> reward -> advantage -> log-probs -> update -> sync."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.hf.description import ModelShape
from pipeline.config import Config
from pipeline.data.prompts import PromptSource
from pipeline.dumps.dump import Dump, write_dump
from pipeline.engine.client import Sampling, SGLangClient
from pipeline.engine.pool import ClientPool
from pipeline.objectives import Denominators, Objective, is_informative, mismatch_metrics, resolve
from pipeline.objectives.terms.kl import kl_estimate
from pipeline.observe.step_record import StepArrays
from pipeline.rewards import grade
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.trainer.group import PolicyTokens, TrainerGroup
from pipeline.trainer.rows import loss_values, padded
from pipeline.types import Group, Rollout, route_dtype


class DisagreementError(RuntimeError):
    """Trainer and rollout engine do not hold the same model, or do not compute the same log-probs."""


class NothingToLearnError(RuntimeError):
    """Dynamic sampling found too few groups whose rewards differ."""


class Timer:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Loop:
    """What a step needs. `version` counts the weights that the servers hold.

    client: None where there is no server, and every step is a dumped one.
    dumps: where steps are written that debug.dump_rollouts names.
    arrays: of the last step.
    """

    config: Config
    shape: ModelShape
    source: PromptSource
    client: SGLangClient | ClientPool | None
    trainers: TrainerGroup
    version: int = 0
    dumps: Path | None = None
    arrays: StepArrays | None = field(default=None, init=False)

    def __post_init__(self):
        self.objective = resolve(self.config.objective)
        precision = self.config.precision
        self.sampling = Sampling(
            max_new_tokens=self.config.rollout.max_new_tokens,
            temperature=precision.temperature,
            top_p=precision.top_p,
            top_k=precision.top_k,
            min_p=precision.min_p,
            return_kept=precision.masks_sampling,
            stop_token_ids=self.source.stop_token_ids,
            seed=self.config.run.seed if self.config.server.deterministic else None,
        )

    def step(self, number: int, dumped: Dump | None = None) -> tuple[dict[str, float], list[Group]]:
        """One RL step; its metrics and what was sampled. dumped: a step's rollouts, not to be sampled and graded."""
        timer = Timer()
        with timer("step"):
            if dumped is None:
                groups, metrics = self.sample(timer)
            else:
                groups, metrics, self.version = list(dumped.groups), {}, dumped.weight_version
            if self.dumps is not None and self.config.debug.dumps(number):
                with timer("dump"):
                    write_dump(self.dumps, Dump(number, self.version, self.sampling.temperature, tuple(groups)))
            rollouts = [r for g in groups for r in g.rollouts]
            with timer("train"):
                self.load(rollouts)
                every = self.config.checks.probe_every
                if self.replay == "r3" and every and (number - 1) % every == 0:
                    metrics |= self.probe_replay(rollouts)
                metrics |= self.update(groups, rollouts, timer)
            sampled_under = self.version
            with timer("sync"):
                self.sync()
        metrics |= group_metrics(groups, rollouts)
        metrics |= {f"time/{phase}_s": seconds for phase, seconds in timer.seconds.items()}
        metrics |= {
            "step": number,
            "weights/version": sampled_under,
            "throughput/train_tokens_per_s": sum(len(r.prompt_ids) + len(r) for r in rollouts) / timer.seconds["train"],
        }
        return metrics, groups

    @property
    def replay(self) -> Literal["none", "r2", "r3"]:
        """As configured; a dense model has no routes."""
        return self.config.replay if self.shape.num_experts else "none"

    def load(self, rollouts: Sequence[Rollout]) -> None:
        """Hand the rollouts to the trainer, with their routes where it is to take them."""
        samples = [to_sample(r) for r in rollouts]
        self.trainers.load(samples if self.replay == "r3" else [replace(s, routes=None) for s in samples])

    def sync(self) -> None:
        """The trainer's weights to the server, where there is one, under the next version."""
        self.version += 1
        if self.client is not None:
            self.trainers.send_weights(self.version)

    def sample(self, timer: Timer) -> tuple[list[Group], dict[str, float]]:
        """The graded groups of a step, and what sampling them took.

        With dynamic sampling (DAPO) a group whose rewards are all equal is replaced by a group of the next prompt, in
        at most `rollout.max_sampling_rounds` rounds. Raises NothingToLearnError where those do not suffice.
        """
        assert self.client is not None
        rollout, groups, drawn, tokens = self.config.rollout, [], 0, 0
        for _ in range(rollout.max_sampling_rounds):
            with timer("rollout"):
                prompts = self.source.take(rollout.prompts_per_step - len(groups))
                new = sample_groups_sync(self.client, prompts, rollout.samples_per_prompt, self.sampling)
            with timer("reward"):
                new = grade(new, self.source.tokenizer, self.source.reward)
            drawn, tokens = drawn + len(new), tokens + sum(len(r) for g in new for r in g.rollouts)
            if self.objective.composition.dynamic_sampling:
                new = [g for g in new if is_informative(torch.from_numpy(g.rewards))]
            groups += new
            if len(groups) == rollout.prompts_per_step:
                break
        else:
            raise NothingToLearnError(
                f"in {rollout.max_sampling_rounds} rounds {len(groups)} of {drawn} groups had rewards that differ, and "
                f"a step needs {rollout.prompts_per_step}: the task is too easy or too hard for the model; take other "
                "data, raise rollout.max_sampling_rounds, or set objective.dynamic_sampling=false"
            )
        metrics = {"throughput/rollout_tokens_per_s": tokens / timer.seconds["rollout"]}
        if self.objective.composition.dynamic_sampling:
            metrics["rollout/groups_replaced"] = float(drawn - len(groups))
        return groups, metrics

    def update(self, groups: Sequence[Group], rollouts: Sequence[Rollout], timer: Timer) -> dict[str, float]:
        """Advantages over the whole batch, then one optimizer step a mini-batch of whole groups.

        With one mini-batch the policy of the update is the proximal one, so that no forward pass of its own is spent on
        pi_o unless something else reads it; the comparison with mu is then made after the step, and stops the run all
        the same.
        """
        objective, count, metrics = self.objective, self.config.train.mini_batches, {}
        proximal = reference = values = None
        with timer("logprob"):
            if self.replay == "r2":
                proximal = self.trainers.record_routes(self.shape.num_layers, route_dtype(self.shape.num_experts))
            elif count > 1 or objective.kl_in_reward:
                proximal = self.trainers.logprobs()
            if proximal is not None:
                metrics = self.compare(rollouts, proximal)
            if objective.needs_reference:
                reference = self.trainers.reference_logprobs()
            if objective.needs_critic:
                values = self.trainers.values()
        if objective.kl_in_reward:
            assert proximal is not None
            assert reference is not None
            metrics["kl/reference"] = mean_kl(objective, proximal.logprobs, reference)
        group_ids = np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])
        per_sample = loss_values(
            objective,
            groups,
            max_new_tokens=self.config.rollout.max_new_tokens,
            proximal=proximal.logprobs if proximal is not None else None,
            reference=reference,
            values=values,
        )
        parts, current, passes = [], {}, []
        for k in range(count):
            chosen = [int(i) for i in np.flatnonzero(group_ids % count == k)]
            denominators = Denominators(
                sequences=len(chosen),
                tokens=sum(len(rollouts[i]) for i in chosen),
                max_length=self.config.rollout.max_new_tokens,
                prompts=len(set(group_ids[chosen].tolist())),
            )
            inputs = {i: per_sample[i] for i in chosen}
            part, seen = self.trainers.update_policy(self.config.objective, denominators, inputs)
            current |= dict(zip(chosen, seen.logprobs, strict=True))
            if objective.needs_critic:
                part |= self.trainers.update_critic(self.config.objective, denominators, inputs)
            parts.append(part)
            passes.append(seen.routing)
            if proximal is None:
                metrics = self.compare(rollouts, seen)
                proximal = seen
        assert proximal is not None
        # Under R3 agreement is the engines', at the proximal weights; under R2 it is the policy's own, as it moves.
        routing = proximal.routing if self.replay == "r3" else np.sum(passes, 0)
        metrics |= routing_metrics(routing)
        advantages = [np.asarray(row["advantage"]) for row in per_sample]
        rows = [current[i] for i in range(len(rollouts))]
        self.arrays = StepArrays(proximal.logprobs, rows, proximal.entropy, advantages, routing)
        return metrics | {n: float(np.mean([p[n] for p in parts if n in p])) for n in set().union(*parts)}

    def compare(self, rollouts: Sequence[Rollout], proximal: PolicyTokens) -> dict[str, float]:
        """How far pi_o is from mu.

        Every token was sampled under the weights that the trainer still holds, so this also proves that the last
        transfer arrived. Raises DisagreementError beyond `checks.max_abs_logprob`.
        """
        metrics = mismatch_of(rollouts, proximal)
        versions = {int(v) for r in rollouts for v in r.weight_versions}
        if versions != {self.version}:
            raise DisagreementError(
                f"tokens were sampled under weights {sorted(versions)}, the trainer holds {self.version}"
            )
        if not metrics["mismatch/abs_logprob"] <= self.config.logprob_bound:
            raise DisagreementError(
                f"under weights {self.version} the log-probs of trainer and server differ by "
                f"{metrics['mismatch/abs_logprob']:.2e} nats on average (largest "
                f"{metrics['mismatch/max_abs_logprob']:.2e}), the bound is {self.config.logprob_bound:.0e}: the weight "
                "transfer failed, or the engines compute different models; checks.max_abs_logprob sets the bound"
            )
        return metrics | {"policy/entropy": float(np.concatenate(proximal.entropy).mean())}

    def probe_replay(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The mismatch of some of the loaded rollouts with their routes replayed, and with native routing."""
        some = rollouts[: self.config.checks.probe_rollouts]
        metrics: dict[str, float] = {}
        for routing in ("replay", "native"):
            found = mismatch_of(some, self.trainers.logprobs(routing, range(len(some))))
            metrics |= {f"probe/{key}_{routing}": found[f"mismatch/{key}"] for key in ("k3", "abs_logprob", "f2")}
        return metrics

    def probe(self) -> None:
        """Sample a little under the newest weights and compare, as `step` does: for the last transfer of a run."""
        assert self.client is not None
        groups = sample_groups_sync(self.client, self.source.take(4), 1, self.sampling)
        rollouts = [r for g in groups for r in g.rollouts]
        self.load(rollouts)
        self.compare(rollouts, self.trainers.logprobs("replay" if self.replay == "r3" else "native"))


def supervise(
    config: Config, source: PromptSource, trainers: TrainerGroup, done: int = 0
) -> Iterator[tuple[int, float]]:
    """Supervised steps on the task's own answers, through the same trainer; yields each step's number and loss, nats a
    token. done: steps that were made before."""
    for number in range(done + 1, config.supervised.steps + 1):
        pairs = source.take_supervised(config.supervised.batch_size)
        yield number, trainers.update_supervised([Sample(p.tokens, p.prompt_length) for p in pairs])["loss/nll"]


def to_sample(rollout: Rollout) -> Sample:
    """A rollout as the trainer reads it, its routes and kept tokens beside it."""
    tokens = np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int32)
    return Sample(tokens, len(rollout.prompt_ids), routes=rollout.routes, kept=rollout.kept)


def mismatch_of(rollouts: Sequence[Rollout], proximal: PolicyTokens) -> dict[str, float]:
    """mismatch_metrics of the same tokens under both engines."""
    mask = padded([np.ones(len(r), bool) for r in rollouts])
    return mismatch_metrics(padded(proximal.logprobs), padded([r.rollout_logprobs for r in rollouts]), mask)


def mean_kl(objective: Objective, proximal: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """The objective's estimate of KL(pi_o || pi_ref), mean over tokens, nats."""
    kl = objective.composition.kl
    assert kl is not None
    log_ratio = torch.from_numpy(np.concatenate(reference) - np.concatenate(proximal)).double()
    return float(kl_estimate(log_ratio, kl.estimator).mean())


def group_metrics(groups: Sequence[Group], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rewards and lengths of a step."""
    rewards = np.concatenate([g.rewards for g in groups])
    lengths = np.array([len(r) for r in rollouts])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/uninformative_groups": float(np.mean([np.ptp(g.rewards) == 0 for g in groups])),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "rollout/retractions": float(sum(r.retractions for r in rollouts)),
        "response/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }


def routing_metrics(routing: np.ndarray) -> dict[str, float]:
    """Shares over tokens and layers, from counts [layers, 3]: replayed, native selection agreed, fallen back."""
    replayed, agreed, fallen = (int(n) for n in routing.sum(0)) if len(routing) else (0, 0, 0)
    out = {"routing/replayed_fraction": replayed / max(replayed + fallen, 1)}
    if replayed:
        out["routing/agreement"] = agreed / replayed
        out["routing/agreement_worst_layer"] = float((routing[:, 1] / np.maximum(routing[:, 0], 1)).min())
    return out
