"""Conversations of five turns on real engines: one sequence, whose every turn is what one forward pass says of it."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_update
from pipeline.config import load_config
from pipeline.loop.open_loop import open_loop
from pipeline.loop.update import Measured, loss_rows
from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.step import Batch
from pipeline.trainer.group import to_sample
from pipeline.trainer.losses import policy_loss
from tests.support import reference
from tests.support.ranks import run_ranks
from tests.support.talks import BLOCKED_S, BLOCKING, TURNS, settings, split, write_questions

pytestmark = [pytest.mark.slow, pytest.mark.proof]

PROMPTS, SAMPLES = 6, 2
OBJECTIVE = ObjectiveConfig(preset="grpo", credit="turn", reduction="token_mean")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Conversations under the first weights, one of them blocked by its tool for 7 s; and under the second, which a
    step on such conversations made."""
    folder = tmp_path_factory.mktemp("turns")
    (folder / "logs").mkdir()
    questions = write_questions(folder, 99)
    steps = [f"rollout.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}", "supervised.steps=0"]
    config = load_config(
        "configs/quickstart.yaml",
        [*settings(questions, "Talk"), *steps, "objective={preset: grpo, credit: turn}", "model.tiny.init_std=0.15"],
    )
    with open_loop(config, folder, folder / "logs") as (loop, model):

        def sampled(count):
            groups = sample_groups_sync(
                loop.fleet, loop.source.take(count), SAMPLES, loop.sampling, attempts=loop.environments
            )
            return loop.grade(groups)[0]

        async def scored(rollouts):
            async with loop.fleet:
                return await asyncio.gather(*(loop.fleet.score(r.token_ids) for r in rollouts))

        rounds = []
        for version in range(2):
            groups = sampled(PROMPTS)
            rollouts = [r for group in groups for r in group.rollouts]
            scores = asyncio.run(scored(rollouts))
            loop.load(rollouts)
            policy = loop.trainers.logprobs("replay")
            rounds.append(SimpleNamespace(groups=groups, rollouts=rollouts, scores=scores, policy=policy))
            if version == 0:
                metrics = loop.step(1).metrics
        servers = loop.fleet.metrics()
    return SimpleNamespace(rounds=rounds, metrics=metrics, servers=servers, model=model)


def test_every_conversation_is_one_sequence_of_five_turns_under_one_version(played):
    for version, made in enumerate(played.rounds):
        assert [r.turns for r in made.rollouts] == [TURNS] * PROMPTS * SAMPLES
        assert all(r.is_of(version) for r in made.rollouts)
        assert all((~r.trained).sum() >= 2 * (TURNS - 1) for r in made.rollouts)


def test_log_probs_of_all_turns_agree_with_the_trainer(played):
    for made in played.rounds:
        pairs = zip(made.rollouts, made.policy.logprobs, strict=True)
        apart = np.concatenate([np.abs(r.rollout_logprobs - found)[r.trained] for r, found in pairs])
        assert len(apart) > 5 * PROMPTS * SAMPLES
        assert apart.max() < 1e-4
    assert played.metrics["mismatch/max_abs_logprob"] < 1e-4
    assert played.metrics["routing/replayed_fraction"] == 1


def test_routes_of_every_turn_are_those_of_one_forward_pass_of_the_whole_conversation(played):
    for made in played.rounds:
        for rollout, (_, routes) in zip(made.rollouts, made.scores, strict=True):
            last = len(rollout.token_ids) - 1
            assert np.array_equal(np.asarray(rollout.routes), np.asarray(routes)[:last])
    model = reference.load(played.model)
    rows = 0
    for rollout in played.rounds[0].rollouts:
        theirs, gap = reference.routes(model, rollout.token_ids[:-1])
        clear = gap > 1e-4
        assert np.array_equal(np.sort(np.asarray(rollout.routes), -1)[clear], np.sort(theirs, -1)[clear])
        rows += int(clear.sum())
    assert rows > 1000


def test_a_tool_that_blocks_for_longer_than_servers_keep_idle_connections_breaks_none(played):
    blocked = played.rounds[0].groups[BLOCKING]
    assert all(episode.verdict.seconds > BLOCKED_S for episode in blocked.episodes)
    assert (played.servers["servers/lost"], played.servers["servers/requests_sent_again"]) == (0, 0)


def gradients(config: ParallelConfig, model: str, samples, denominators):
    """Runs on a rank: the update's parts, the gradient of each sample's log-probs, and of all weights."""
    from megatron_ext.trainer import Trainer
    from tests.support.jobs import keep_gradients, whole_gradients

    it = Trainer(model, config, TrainerConfig(micro_batch_tokens=256), OptimizerConfig(), replay=True)
    keep_gradients(it.policy)
    loss, by_sample = policy_loss(resolve(OBJECTIVE), denominators), {}

    def watched(batch):
        def keep(gradient):
            by_sample.update(zip(batch.indices, gradient.numpy().copy(), strict=True))

        batch.quantities[0].register_hook(keep)
        return loss(batch)

    parts = it.update(samples, watched)
    return parts, by_sample, whole_gradients(it.policy)


@pytest.fixture(scope="module")
def learned(played):
    """(log-prob gradients of conversations, (loss, weight gradients) of conversations and of their turns as answers)"""
    made = played.rounds[0]
    rows = loss_rows(resolve(OBJECTIVE), Batch(1, 0, tuple(made.groups)), Measured(None), max_new_tokens=90)
    whole = [replace(to_sample(r), row=row) for r, row in zip(made.rollouts, rows, strict=True)]
    parts = [
        replace(
            to_sample(alone), row=replace(row, rollout_logprobs=alone.rollout_logprobs, advantage=row.advantage[where])
        )
        for r, row in zip(made.rollouts, rows, strict=True)
        for alone, where in split(r)
    ]
    tokens = sum(r.trained_tokens for r in made.rollouts)
    denominators = Denominators(len(whole), tokens, 90, prompts=PROMPTS)
    run = functools.partial(run_ranks, gradients, ParallelConfig(), str(played.model))
    ((update, by_token, weights),) = run(whole, denominators)
    ((others, _, theirs),) = run(parts, denominators)
    losses = [merge_update([found])["loss/objective"] for found in (update, others)]
    return by_token, losses, (weights, theirs)


def test_the_gradient_of_what_others_said_is_zero_exactly_with_replay(played, learned):
    by_token, _, _ = learned
    assert len(by_token) == len(played.rounds[0].rollouts)
    moved = 0
    for i, rollout in enumerate(played.rounds[0].rollouts):
        found = by_token[i][: len(rollout)]
        assert (found[~rollout.trained] == 0).all()
        assert (by_token[i][len(rollout) :] == 0).all()
        moved += int((found[rollout.trained] != 0).sum())
    assert moved > sum(r.trained_tokens for r in played.rounds[0].rollouts) / 2


def test_loss_and_gradient_are_those_of_each_turn_as_a_single_answer(learned):
    _, (whole, parts), (weights, theirs) = learned
    assert whole == pytest.approx(parts, rel=1e-5, abs=1e-7)
    assert weights.keys() == theirs.keys()
    a, b = (np.concatenate([found[name].ravel() for name in sorted(weights)]) for found in (weights, theirs))
    assert np.linalg.norm(a) > 0
    assert np.linalg.norm(a - b) <= 5e-6 * np.linalg.norm(a)
