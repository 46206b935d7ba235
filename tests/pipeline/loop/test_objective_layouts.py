"""T8: through the real trainer, loss and gradient of every preset do not depend on how the batch is cut up."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.batch.layout import Sample, plan_micro_batches
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_tokens, merge_update
from pipeline.loop.update import Measured, loss_rows
from pipeline.objectives import Denominators, KLConfig, ObjectiveConfig, resolve
from pipeline.step import Batch, PolicyTokens
from pipeline.trainer.group import to_sample
from pipeline.trainer.losses import critic_loss, policy_loss
from pipeline.types import Group, Prompt, Rollout
from tests.support.batches import DISTINCT
from tests.support.episodes import graded_group
from tests.support.proofs import sampled
from tests.support.ranks import run_ranks

PROMPTS, SAMPLES, LONGEST = 4, 4, 12
# Each loss that a preset has, and the two that hold most: a KL in the loss, and an entropy bonus beside it.
OBJECTIVES = {name: ObjectiveConfig(preset=name) for name in DISTINCT} | {
    "grpo with unbiased k3": ObjectiveConfig(preset="grpo", kl=KLConfig(estimator="unbiased_k3", beta=0.1)),
    "gspo with k3": ObjectiveConfig(preset="gspo", kl=KLConfig(estimator="k3", beta=0.1)),
}
LAYOUTS = {
    "2 micro-batches": ({}, 2, True),
    "4 micro-batches": ({}, 4, True),
    "padded": ({}, 1, False),
    "padded, 4 micro-batches": ({}, 4, False),
    "data 2": ({"ranks": 2}, 1, True),
    "data 2, 2 micro-batches": ({"ranks": 2}, 2, True),
    "context 2": ({"ranks": 2, "context": 2}, 1, True),
    "context 2, padded, 4 micro-batches": ({"ranks": 2, "context": 2}, 4, False),
    "data 2, context 2, padded": ({"ranks": 4, "context": 2}, 1, False),
    "data 2, context 2, padded, 2 micro-batches": ({"ranks": 4, "context": 2}, 2, False),
}
SAMPLE = ["data 2, context 2, padded, 2 micro-batches"]  # cut in every way that the others are in one or two


def make_groups() -> list[Group]:
    """Groups of random tokens with binary rewards, none of equal rewards."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(PROMPTS):
        prompt = rng.integers(0, 512, int(rng.integers(2, 6))).astype(np.int32)
        rewards = np.array([1.0, 0.0, *rng.integers(0, 2, SAMPLES - 2)], np.float32)
        rollouts = []
        for _ in rewards:
            n = int(rng.integers(1, LONGEST + 1))
            rollouts.append(
                Rollout(
                    prompt_ids=prompt,
                    response_ids=rng.integers(0, 512, n).astype(np.int32),
                    rollout_logprobs=np.zeros(n, np.float32),
                    routes=None,
                    weight_versions=np.zeros(n, np.int32),
                    finish_reason="stop",
                )
            )
        groups.append(graded_group(Prompt(prompt, ""), rollouts, rewards))
    return groups


def budget(samples: list[Sample], ranks: int, count: int) -> int:
    """The smallest token budget under which each data-parallel rank has `count` micro-batches."""
    lengths = [s.input_length for s in samples]
    for tokens in range(max(lengths), sum(lengths) + 1):
        if len(plan_micro_batches(lengths, token_budget=tokens, dp_size=ranks)[0]) == count:
            return tokens
    raise AssertionError(f"no budget gives {count} micro-batches")


def current_logprobs(config: ParallelConfig, model: str, samples: list[Sample]):
    from megatron_ext.trainer import Trainer

    return Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False).logprobs(samples)


@functools.cache
def inputs_of(model: str) -> dict[str, tuple[list[Sample], Denominators]]:
    """For each objective the samples with what its loss reads: pi_o near pi, mu near pi_o."""
    groups, rng = make_groups(), np.random.default_rng(1)
    samples = [to_sample(r) for g in groups for r in g.rollouts]
    (part,) = run_ranks(current_logprobs, ParallelConfig(), model, samples)
    current = merge_tokens([part], len(samples))[0]

    def near(rows, scale):
        return [(row + scale * rng.normal(size=len(row))).astype(np.float32) for row in rows]

    proximal = near(current, 0.05)
    rollout, reference, values = near(proximal, 0.02), near(proximal, 0.1), near([0 * c for c in current], 1.0)
    flat = iter(rollout)
    groups = [
        graded_group(g.prompt, [replace(r, rollout_logprobs=np.minimum(next(flat), 0)) for r in g.rollouts], g.rewards)
        for g in groups
    ]
    denominators = Denominators(len(samples), sum(s.response_length for s in samples), LONGEST, prompts=PROMPTS)
    out = {}
    for name, config in OBJECTIVES.items():
        objective = resolve(config)
        measured = Measured(
            PolicyTokens(proximal, [], np.zeros((0, 4), np.int64)),
            reference if objective.needs_reference else None,
            values if objective.needs_critic else None,
        )
        rows = loss_rows(objective, Batch(1, 1, tuple(groups)), measured, max_new_tokens=LONGEST)
        out[name] = ([replace(s, row=row) for s, row in zip(samples, rows, strict=True)], denominators)
    return out


def losses_and_gradients(config: ParallelConfig, model: str, trainer: TrainerConfig, inputs):
    """Runs on a rank: objective -> (parts of the policy's update and of the critic's, gradients)."""
    from megatron_ext.trainer import Trainer
    from tests.support.jobs import keep_gradients, whole_gradients

    it = Trainer(model, config, trainer, OptimizerConfig(), replay=False, critic=OptimizerConfig())
    assert it.critic is not None
    keep_gradients(it.policy)
    keep_gradients(it.critic)
    answers = {}
    for name, (samples, denominators) in inputs.items():
        objective = resolve(OBJECTIVES[name])
        parts = [it.update(samples, policy_loss(objective, denominators))]
        gradients = whole_gradients(it.policy)
        if objective.needs_critic:
            parts.append(it.update_critic(samples, critic_loss(objective, denominators)))
            gradients |= {f"critic {n}": g for n, g in whole_gradients(it.critic).items()}
        answers[name] = (parts, gradients)
    return answers


def outcome(model: str, layout: dict, micro_batches: int, packing: bool):
    """objective -> (loss of policy and critic, whole gradient as one vector)."""
    inputs, config = inputs_of(model), ParallelConfig(**layout)
    samples = next(iter(inputs.values()))[0]
    trainer = TrainerConfig(micro_batch_tokens=budget(samples, config.data, micro_batches), packing=packing)
    ranks = run_ranks(losses_and_gradients, config, model, trainer, inputs)
    out = {}
    for name in OBJECTIVES:
        updates = zip(*(answers[name][0] for answers in ranks), strict=True)
        gradients = ranks[0][name][1]
        vector = np.concatenate([gradients[n].ravel() for n in sorted(gradients)])
        out[name] = ([merge_update(u)["loss/objective"] for u in updates], vector)
    return out


@functools.cache
def one_micro_batch(model: str):
    return outcome(model, {}, 1, True)


@pytest.mark.parametrize("layout", sampled(LAYOUTS, SAMPLE))
def test_loss_and_gradient_of_every_preset_are_those_of_one_packed_micro_batch(tiny_model_dir, layout):
    reference, other = one_micro_batch(str(tiny_model_dir)), outcome(str(tiny_model_dir), *LAYOUTS[layout])
    for name, (losses, gradient) in reference.items():
        found, theirs = other[name]
        assert len(losses) == (2 if name == "ppo" else 1)
        # A product of ratios has the rounding of every token of its response in its exponent; 1.6e-6 was the most seen.
        close = 5e-6 if resolve(OBJECTIVES[name]).composition.ratio == "product" else 1e-6
        assert found == pytest.approx(losses, rel=close, abs=1e-6), name
        assert np.abs(theirs - gradient).max() <= close, name
        # Of the whole gradient, float32's own rounding through four layers: 1.2e-6 was the most seen.
        assert np.linalg.norm(theirs - gradient) <= 2 * close * np.linalg.norm(gradient), name
        assert np.abs(gradient).max() > 1e-3, name
