"""The loop. Read `Loop.step`: sample -> reward -> advantage -> log-probs -> update -> sync."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from megatron_ext.batch.layout import Sample
from megatron_ext.exchange import Exchange
from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config
from pipeline.config.replay import Replay
from pipeline.data.prompts import PromptSource
from pipeline.dumps.dump import Dump, dump_path, write_dump
from pipeline.engine.fleet import Fleet
from pipeline.engine.sampling import Sampling
from pipeline.environments.running import Environments
from pipeline.errors import SamerouteError
from pipeline.loop.compare import DisagreementError, compare, compare_scored, replay_probe, scored_rollouts
from pipeline.loop.evaluations import on_own_loop
from pipeline.loop.update import NotFiniteError, Update, teaches
from pipeline.objectives import resolve
from pipeline.observe.metrics import Timer, batch_metrics, lag_metrics
from pipeline.rewards import Failures, RewardError, grade
from pipeline.rollout.answers import Scored
from pipeline.rollout.grading import Graders, Grading
from pipeline.rollout.maker import NothingToLearnError
from pipeline.rollout.producer import Producer, Taken
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.rollout.teacher import Teacher
from pipeline.step import Batch, StepResult
from pipeline.trainer.group import TrainerGroup, to_sample
from pipeline.trainer.spikes import GradientSpikes
from pipeline.trainer.waits import TrainerError
from pipeline.types import Ended, Group, Rollout
from pipeline.waiting import Waiting

_MOST_KEPT = 10  # batches of a run that are dumped because something was wrong with them


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Loop:
    """What a step needs.

    fleet, grading: the servers and what grades their answers; without any, every step is a dumped one.
    graders: where another set of verifiers would grade, those of an evaluation.
    producer: makes groups beside the training, where rollout.max_staleness is more than 0; see `asynchronous`.
    environments: lead the conversations of a run with an environment.
    teacher: scores answers as they end, where objective.distillation learns from servers.
    dumps: where steps are written that debug.dump_rollouts names.
    say: hears of answers that could not be graded.
    """

    config: Config
    shape: ModelDescription
    source: PromptSource
    fleet: Fleet
    trainers: TrainerGroup
    dumps: Path | None = None
    grading: Grading | None = None
    graders: Graders | None = None
    producer: Producer | None = None
    environments: Environments | None = None
    teacher: Teacher | None = None
    say: Callable[[str], None] = _to_standard_error

    def __post_init__(self):
        self.objective = resolve(self.config.objective)
        self.waiting, self.spikes, self._kept = Waiting(), GradientSpikes(self.config.train), 0
        self._ended: list[Ended] = []
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

    def step(self, number: int, dumped: Dump | None = None) -> StepResult:
        """One RL step. dumped: a step's rollouts, not to be sampled and graded."""
        timer, self._ended = Timer(), []
        with timer("step"):
            if dumped is not None:
                groups, metrics = list(dumped.batch.groups), {}
                self.fleet.adopt(dumped.batch.version)
            elif self.producer is not None:
                groups, metrics = self.collect(self.producer, timer, number)
            else:
                groups, metrics = self.sample(timer, number)
            batch = Batch(number, self.fleet.version, tuple(groups))
            if self.dumps is not None and self.config.debug.dumps(number):
                with timer("dump"):
                    write_dump(self.dumps, Dump(batch, self.sampling.temperature))
            with timer("train"):
                self.load(batch.rollouts)
                metrics |= self.probe_replay(batch)
                with self._kept_where_it_fails(batch):
                    result = self.update(batch, timer)
            if why := self.spikes.ended():
                self.say(f"step {number}: an update was skipped, {why}; {self._keep(batch)}")
            with self._kept_where_it_fails(batch):
                self.transfer(timer)
        read = sum(len(r.prompt_ids) + len(r) for r in batch.rollouts)
        metrics |= result.metrics | batch_metrics(batch) | self.fleet.metrics() | self.trainers.sent_metrics()
        metrics |= {} if self.environments is None else self.environments.metrics()
        metrics |= {f"time/{phase}_s": seconds for phase, seconds in timer.seconds.items()}
        if self.config.rollout.max_staleness:
            metrics |= lag_metrics(batch)
            metrics["idle/trainer"] = sum(timer.seconds.get(p, 0.0) for p in ("wait", "pause")) / timer.seconds["step"]
        metrics |= {
            "step": number,
            "weights/version": batch.version,
            "train/steps_skipped_in_a_row": float(self.spikes.in_a_row),
            "throughput/train_tokens_per_s": read / timer.seconds["train"],
        }
        return replace(result, metrics=metrics, ended=tuple(self._ended), ranks=self.trainers.take_seconds())

    def _keep(self, batch: Batch) -> str:
        """Dump what a step trains on, for those who look into it; where it is, in words."""
        if self.dumps is None or (self._kept == _MOST_KEPT and not self.config.debug.dumps(batch.step)):
            return f"its batch is not dumped, as those of {self._kept} others are" if self._kept else "it is not dumped"
        file = dump_path(self.dumps, batch.step)
        if not self.config.debug.dumps(batch.step):
            self._kept += 1
            file = write_dump(self.dumps, Dump(batch, self.sampling.temperature))
        return f"its batch is {file}"

    @contextlib.contextmanager
    def _kept_where_it_fails(self, batch: Batch) -> Iterator[None]:
        """Where numbers are wrong, or a rank raises, the batch is kept, and weights that are not finite are named."""
        try:
            yield
        except (DisagreementError, NotFiniteError, TrainerError) as error:
            if not isinstance(error, TrainerError) or isinstance(error.__cause__, RayTaskError):
                said = self.trainers.weights_not_finite()
                try:
                    said += [self._keep(batch)]
                except (OSError, SamerouteError) as why:
                    said += [f"its batch could not be dumped: {why}"]
                for words in said:
                    self.say(f"step {batch.step}: {words}")
            raise

    @property
    def replay(self) -> Replay:
        """As configured; a dense model has no routes."""
        return self.config.replay.of_model(self.shape.num_experts)

    def load(self, rollouts: Sequence[Rollout]) -> None:
        """Hand the rollouts to the trainer, with their routes where it is to take them."""
        samples = [to_sample(r) for r in rollouts]
        self.trainers.load(samples if self.replay.from_server else [replace(s, routes=None) for s in samples])

    def update(self, batch: Batch, timer: Timer) -> StepResult:
        """Train on a batch whose rollouts are loaded; see `Update`."""
        return Update(self.config, self.objective, self.trainers, self.shape, self.replay, self.spikes)(batch, timer)

    def sync(self) -> None:
        """The trainer's weights to the servers, where there are any, under the next version."""
        self.fleet.transfer(self.trainers)

    def on_servers[T](self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run what samples, beside the producer where there is one."""
        return on_own_loop(work) if self.producer is None else self.producer.run(work)

    def _waits_for_servers(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around a call that the servers hold up: a line says so where it is long."""
        limit_s = self.config.rollout.timeout_s
        return self.waiting.during(what, lambda: "answers of the servers (logs/sglang*.log)", limit_s)

    def transfer(self, timer: Timer) -> None:
        """`sync`, while no server samples."""
        if self.producer is not None:
            with timer("pause"), self._waits_for_servers("the pause before a transfer"):
                self.producer.pause()
        with timer("sync"):
            self.sync()
        if self.producer is not None:
            self.producer.resume(self.fleet.version)

    def collect(self, producer: Producer, timer: Timer, number: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of step `number` that were made while earlier ones trained, and what was made since."""
        with timer("wait"), self._waits_for_servers("sampling"):
            taken = producer.take()
        if taken.failures.first:
            self.say(f"step {number}: {taken.failures}")
        with timer("check"):
            metrics = taken.metrics | self.check_servers(taken)
        self._ended = taken.ended
        return taken.groups, metrics

    def check_servers(self, taken: Taken) -> dict[str, float]:
        """Hold the trainer against what the servers scored under its weights, or sampled under them alone: the rollouts
        of a step may all be of older ones. Raises DisagreementError."""
        if taken.scored:
            return self.compare_scored(taken.scored)
        own = (r for group in taken.groups for r in group.rollouts if r.is_of(self.fleet.version))
        rollouts = itertools.islice(own, self.config.checks.scored_rollouts * len(self.fleet.servers))
        return self._compare(list(rollouts), None)

    def compare_scored(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Hold the trainer against sequences that servers scored under its weights. Raises DisagreementError."""
        exchange = None if self.sampling.temperature == 1 else Exchange(temperature=1.0)
        return self._compare(scored_rollouts(scored, self.fleet.version), exchange)

    def _compare(self, rollouts: Sequence[Rollout], exchange: Exchange | None) -> dict[str, float]:
        self.load(rollouts)
        policy = self.trainers.logprobs("replay" if self.replay.from_server else "native", exchange=exchange)
        return compare_scored(rollouts, policy, version=self.fleet.version, bound=self.config.logprob_bound)

    def sample(self, timer: Timer, number: int) -> tuple[list[Group], dict[str, float]]:
        """The graded groups of step `number`, and what sampling them took.

        With dynamic sampling (DAPO) a group whose rewards are all equal is replaced by a group of the next prompt, in
        at most `rollout.max_sampling_rounds` rounds; so is one that has no rewards. Raises NothingToLearnError where
        those do not suffice, RewardError where the verifier failed on so much that nothing is left.
        """
        rollout, groups, drawn, tokens = self.config.rollout, [], 0, 0
        graded, failures = 0, Failures()
        for _ in range(rollout.max_sampling_rounds):
            with timer("rollout"), self._waits_for_servers("sampling"):
                prompts = self.source.take(rollout.prompts_per_step - len(groups))
                new = sample_groups_sync(
                    self.fleet,
                    prompts,
                    rollout.samples_per_prompt,
                    self.sampling,
                    attempts=self.environments,
                    teacher=self.teacher,
                )
            with timer("reward"):
                new, failed = self.grade(new)
            for group in new:
                self.source.learned(group.prompt, group.rewards)
            failures, graded = failures + failed, graded + sum(len(g.rewards) for g in new)
            if not graded:
                raise RewardError(f"step {number}: nothing is left to train on; {failures}")
            drawn, tokens = drawn + len(new), tokens + sum(len(r) for g in new for r in g.rollouts)
            if self.objective.composition.dynamic_sampling:
                differ = [teaches(self.objective, group) for group in new]
                dropped = (g for g, kept in zip(new, differ, strict=True) if not kept)
                self._ended += [Ended(g, "uninformative" if len(g.rewards) else "failed") for g in dropped]
                new = [g for g, kept in zip(new, differ, strict=True) if kept]
            groups += new
            if len(groups) == rollout.prompts_per_step:
                break
        else:
            raise NothingToLearnError(
                f"in {rollout.max_sampling_rounds} rounds {len(groups)} of {drawn} groups had rewards that differ, and "
                f"a step needs {rollout.prompts_per_step}: the task is too easy or too hard for the model; take other "
                "data, raise rollout.max_sampling_rounds, or set objective.dynamic_sampling=false"
                + (f". Besides, {failures}" if failures.first else "")
            )
        if failures.first:
            self.say(f"step {number}: {failures}")
        metrics = (
            {"throughput/rollout_tokens_per_s": tokens / timer.seconds["rollout"]}
            | failures.metrics()
            | self.source.metrics()
        )
        metrics |= {} if self.teacher is None else self.teacher.metrics()
        if self.objective.composition.dynamic_sampling:
            metrics["rollout/groups_replaced"] = float(drawn - len(groups))
        return groups, metrics

    def grade(self, groups: Sequence[Group]) -> tuple[list[Group], Failures]:
        """With rewards, or why there are none."""
        assert self.grading is not None
        on_failure = self.config.grading.on_failure
        return grade(groups, self.grading, on_failure=on_failure, least=self.least_graded)

    @property
    def least_graded(self) -> int:
        """Graded episodes that a group needs: a baseline over a group needs two."""
        return 2 if self.objective.needs_group else 1

    def probe_replay(self, batch: Batch) -> dict[str, float]:
        """At the steps that checks.probe_every names, what the mismatch is with and without replay; else nothing."""
        checks = self.config.checks
        if not self.replay.from_server or not checks.probe_every or (batch.step - 1) % checks.probe_every:
            return {}
        return replay_probe(self.trainers, batch.rollouts[: checks.probe_rollouts])

    def probe(self) -> None:
        """Sample a little under the newest weights and compare, as `step` does: for the last transfer of a run."""
        with self._waits_for_servers("sampling"):
            groups = sample_groups_sync(self.fleet, self.source.take(4), 1, self.sampling)
        rollouts = [r for g in groups for r in g.rollouts]
        self.load(rollouts)
        policy = self.trainers.logprobs("replay" if self.replay.from_server else "native")
        compare(rollouts, policy, version=self.fleet.version, bound=self.config.logprob_bound)


def supervise(
    config: Config, source: PromptSource, trainers: TrainerGroup, done: int = 0
) -> Iterator[tuple[int, float]]:
    """Supervised steps on the task's own answers, through the same trainer; yields each step's number and loss, nats a
    token. done: steps that were made before."""
    for number in range(done + 1, config.supervised.steps + 1):
        pairs = source.take_supervised(config.supervised.batch_size)
        yield number, trainers.update_supervised([Sample(p.tokens, p.prompt_length) for p in pairs])["loss/nll"]
