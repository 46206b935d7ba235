"""The loop. Read `Loop.step` first: sample -> reward -> advantage -> log-probs -> update -> sync."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_ext.layout import Sample
from pipeline.config import Config
from pipeline.data.prompts import PromptSource
from pipeline.objectives import Denominators, mismatch_metrics, overlong_penalty, resolve
from pipeline.observe.step_record import StepArrays
from pipeline.rewards import grade
from pipeline.rollout.client import Sampling, SGLangClient
from pipeline.rollout.dump import Dump, write_dump
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.types import Group, Rollout
from pipeline.workers import Logprobs, TrainerGroup


class DisagreementError(RuntimeError):
    """Trainer and rollout engine do not hold the same model, or do not compute the same log-probs."""


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

    client: None where there is no server, and every step is a `replay`.
    dumps: where steps are written that debug.dump_rollouts names.
    arrays: of the last step.
    """

    config: Config
    source: PromptSource
    client: SGLangClient | None
    trainers: TrainerGroup
    version: int = 0
    dumps: Path | None = None
    arrays: StepArrays | None = field(default=None, init=False)

    def __post_init__(self):
        self.objective = resolve(self.config.objective)
        rollout = self.config.rollout
        self.sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            stop_token_ids=self.source.stop_token_ids,
        )

    def step(self, number: int, replay: Dump | None = None) -> tuple[dict[str, float], list[Group]]:
        """One RL step; its metrics and what was sampled. replay: a step's rollouts, not to be sampled and graded."""
        timer = Timer()
        with timer("step"):
            groups = self.sample(timer) if replay is None else list(replay.groups)
            if replay is not None:
                self.version = replay.weight_version
            if self.dumps is not None and self.config.debug.dumps(number):
                with timer("dump"):
                    write_dump(self.dumps, Dump(number, self.version, self.sampling.temperature, tuple(groups)))
            rollouts = [r for g in groups for r in g.rollouts]
            with timer("train"):
                self.trainers.load([to_sample(r) for r in rollouts])
                metrics = self.update(groups, rollouts, timer)
            sampled_under = self.version
            with timer("sync"):
                self.sync()
        tokens = sum(len(r) for r in rollouts)
        metrics |= group_metrics(groups, rollouts)
        metrics |= {f"time/{phase}_s": seconds for phase, seconds in timer.seconds.items()}
        metrics |= {
            "step": number,
            "weights/version": sampled_under,
            "throughput/train_tokens_per_s": sum(len(r.prompt_ids) + len(r) for r in rollouts) / timer.seconds["train"],
        }
        if replay is None:
            metrics["throughput/rollout_tokens_per_s"] = tokens / timer.seconds["rollout"]
        return metrics, groups

    def sample(self, timer: Timer) -> list[Group]:
        """The graded groups of the next prompts."""
        assert self.client is not None
        rollout = self.config.rollout
        with timer("rollout"):
            prompts = self.source.take(rollout.prompts_per_step)
            groups = sample_groups_sync(self.client, prompts, rollout.samples_per_prompt, self.sampling)
        with timer("reward"):
            return grade(groups, self.source.tokenizer, self.source.reward)

    def sync(self) -> None:
        """The trainer's weights to the server, where there is one, under the next version."""
        self.version += 1
        if self.client is not None:
            self.trainers.send_weights(self.version)

    def compare(self, rollouts: Sequence[Rollout], proximal: Logprobs) -> dict[str, float]:
        """How far pi_o is from mu, and how the routers would have chosen.

        Every token was sampled under the weights that the trainer still holds, so this also proves that the last
        transfer arrived. Raises DisagreementError beyond `checks.max_abs_logprob`.
        """
        logprobs, entropy, routing = proximal
        mask = padded([np.ones(len(r), bool) for r in rollouts])
        metrics = mismatch_metrics(padded(logprobs), padded([r.rollout_logprobs for r in rollouts]), mask)
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
        return metrics | routing_metrics(routing) | {"policy/entropy": float(np.concatenate(entropy).mean())}

    def update(self, groups: Sequence[Group], rollouts: Sequence[Rollout], timer: Timer) -> dict[str, float]:
        """Advantages over the whole batch, then one optimizer step a mini-batch of whole groups.

        With one mini-batch the policy of the update is the proximal one, so that no forward pass of its own is spent on
        pi_o; the comparison with mu is then made after the step, and stops the run all the same.
        """
        count = self.config.train.mini_batches
        group_ids = np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])
        mask = torch.from_numpy(padded([np.ones(len(r), bool) for r in rollouts]))
        rewards = torch.from_numpy(np.concatenate([g.rewards for g in groups]).astype(np.float64))
        if ramp := round(self.objective.composition.overlong_fraction * self.config.rollout.max_new_tokens):
            rewards = rewards + overlong_penalty(mask.sum(-1), self.config.rollout.max_new_tokens, ramp)
        advantages = self.objective.advantages(rewards, torch.from_numpy(group_ids), mask).advantages.numpy()
        values: list[dict[str, np.ndarray | float]] = [
            {"rollout_logprobs": r.rollout_logprobs, "advantage": a if np.ndim(a) == 0 else a[: len(r)]}
            for r, a in zip(rollouts, advantages, strict=True)
        ]
        metrics: dict[str, float] = {}
        current: dict[int, np.ndarray] = {}
        proximal = None
        if count > 1:
            with timer("logprob"):
                proximal = self.trainers.logprobs()
            metrics = self.compare(rollouts, proximal)
            for value, logprobs in zip(values, proximal[0], strict=True):
                value["proximal_logprobs"] = logprobs
        parts = []
        for k in range(count):
            chosen = np.flatnonzero(group_ids % count == k)
            denominators = Denominators(
                sequences=len(chosen),
                tokens=sum(len(rollouts[i]) for i in chosen),
                max_length=self.config.rollout.max_new_tokens,
            )
            part, seen = self.trainers.update_policy(
                self.config.objective, denominators, {int(i): values[i] for i in chosen}
            )
            parts.append(part)
            current |= dict(zip(chosen.tolist(), seen[0], strict=True))
            if proximal is None:
                metrics = self.compare(rollouts, proximal := seen)
        assert proximal is not None
        rows = [current[i] for i in range(len(rollouts))]
        self.arrays = StepArrays(proximal[0], rows, proximal[1], advantages, routing=proximal[2])
        return metrics | {n: float(np.mean([p[n] for p in parts if n in p])) for n in set().union(*parts)}

    def probe(self) -> None:
        """Sample a little under the newest weights and compare, as `step` does: for the last transfer of a run."""
        assert self.client is not None
        groups = sample_groups_sync(self.client, self.source.take(4), 1, self.sampling)
        rollouts = [r for g in groups for r in g.rollouts]
        self.trainers.load([to_sample(r) for r in rollouts])
        self.compare(rollouts, self.trainers.logprobs())


def supervise(config: Config, source: PromptSource, trainers: TrainerGroup) -> Iterator[float]:
    """Supervised steps on the task's own answers, through the same trainer; yields each step's loss, nats a token."""
    for _ in range(config.supervised.steps):
        pairs = source.take_supervised(config.supervised.batch_size)
        yield trainers.update_supervised([Sample(p.tokens, p.prompt_length) for p in pairs])["loss/nll"]


def to_sample(rollout: Rollout) -> Sample:
    """A rollout as the trainer reads it, its routes beside it."""
    tokens = np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int32)
    return Sample(tokens, len(rollout.prompt_ids), routes=rollout.routes)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one matrix, zeros (False) behind."""
    out = np.zeros((len(rows), max(len(r) for r in rows)), rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


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
