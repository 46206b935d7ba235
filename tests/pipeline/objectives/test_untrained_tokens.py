"""Untrained tokens between trained ones change nothing: loss, gradient and metrics are those without them."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.objectives import (
    PRESETS,
    LossInputs,
    ObjectiveConfig,
    mismatch_by,
    mismatch_metrics,
    overlong_penalty,
    resolve,
)
from pipeline.objectives.cells import CorrectionKind, KLEstimator, Reduction
from tests.support.batches import leaves, make_batch, whole


def compact(matrix: Tensor, mask: Tensor) -> Tensor:
    """Every row's trained entries at its front; the longest row has no padding."""
    order = (~mask).to(torch.int64).argsort(dim=-1, stable=True)
    return matrix.detach().gather(1, order)[:, : int(mask.sum(-1).max())]


def compacted(x: LossInputs) -> LossInputs:
    """The same sequences with their untrained tokens taken out."""
    fields = {
        name: compact(value, x.mask).requires_grad_(value.requires_grad)
        for name, value in vars(x).items()
        if isinstance(value, Tensor) and value.dim() == 2
    }
    return replace(x, **fields)


def assert_the_same(x: LossInputs, **config) -> None:
    objective, short = resolve(ObjectiveConfig(**config)), compacted(x)
    assert x.mask.shape[1] > short.mask.shape[1]
    out, expected = objective.loss(x, whole(x)), objective.loss(short, whole(short))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-13, atol=1e-15)
    gradients = torch.autograd.grad(out.loss, leaves(x))
    for gradient, other in zip(gradients, torch.autograd.grad(expected.loss, leaves(short)), strict=True):
        torch.testing.assert_close(compact(gradient, x.mask), other, rtol=1e-12, atol=1e-15)
        assert torch.equal(gradient[~x.mask], torch.zeros_like(gradient[~x.mask]))
        assert gradient.abs().max() > 0
    assert out.metrics.keys() == expected.metrics.keys()
    for name, metric in out.metrics.items():
        assert metric.value() == pytest.approx(expected.metrics[name].value(), rel=1e-12, abs=1e-14), name


def batch_of(name: str, seed: int, discrepancy: float = 0.05) -> LossInputs:
    """With a reference and an entropy; a tenth of the ratios is outside a clip of 0.2."""
    x = make_batch(name, seed, sequences=7, tokens=24, staleness=0.12, discrepancy=discrepancy, holes=True)
    entropy = (0.5 - x.proximal_logprobs).requires_grad_()
    return replace(x, reference_logprobs=x.proximal_logprobs - 0.1, entropy=entropy)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_of_every_preset_with_a_kl_and_an_entropy_bonus(name: str) -> None:
    for seed in range(5):
        kl = {"estimator": "k3", "beta": 0.1, "place": "loss"}
        assert_the_same(batch_of(name, seed), preset=name, kl=kl, entropy_coefficient=0.01)


@pytest.mark.parametrize("kind", get_args(CorrectionKind))
def test_of_every_correction(kind: str) -> None:
    for seed in range(5):
        x = batch_of("grpo", seed, 0.01 if kind == "geometric_mask" else 0.05)
        name = "grpo" if kind != "mean_mis" else "dr_gspo"
        assert_the_same(x, preset=name, correction={"kind": kind}, entropy_coefficient=0.01)


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
@pytest.mark.parametrize("reduction", [r for r in get_args(Reduction) if r != "sequence_mean"])
def test_of_every_reduction_and_kl(reduction: str, estimator: str) -> None:
    kl = {"estimator": estimator, "beta": 0.1, "place": "loss"}
    assert_the_same(batch_of("grpo", 0), preset="grpo", reduction=reduction, kl=kl, entropy_coefficient=0.01)


@pytest.mark.parametrize(
    "cells",
    [
        {"preset": "ppo"},
        {"preset": "ppo", "gae_gamma": 0.9, "gae_lambda": 0.5},
        {"preset": "ppo", "kl": {"estimator": "k1", "beta": 0.3, "place": "reward"}},
        {"preset": "reinforce_plus_plus"},
        {"preset": "grpo", "advantage": "batch_std"},
        {"preset": "grpo", "kl": {"estimator": "k2", "beta": 0.3, "place": "reward"}},
        {"preset": "rloo", "kl": {"estimator": "k3", "beta": 0.3, "place": "reward"}},
        {"preset": "dr_grpo", "whiten": True},
        {"preset": "areal_grpo"},
        {"preset": "areal_dr_grpo"},
    ],
    ids=lambda cells: "-".join(map(str, cells.values())),
)
def test_of_every_advantage(cells: dict) -> None:
    x = make_batch("ppo", 3, sequences=6, tokens=24, holes=True)
    assert x.values is not None
    matrices = {"proximal_logprobs": x.proximal_logprobs, "reference_logprobs": x.rollout_logprobs, "values": x.values}
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    objective, groups = resolve(ObjectiveConfig(**cells)), torch.tensor([0, 0, 1, 1, 2, 2])
    out = objective.advantages(rewards, groups, x.mask, **matrices)
    short = {name: compact(matrix, x.mask) for name, matrix in matrices.items()}
    expected = objective.advantages(rewards, groups, compact(x.mask, x.mask), **short)
    for found, other in ((out.advantages, expected.advantages), (out.returns, expected.returns)):
        if found is None or found.dim() == 1:
            torch.testing.assert_close(found, other, rtol=1e-13, atol=0)
        else:
            torch.testing.assert_close(compact(found, x.mask), other, rtol=1e-12, atol=1e-14)
            assert found[~x.mask].abs().max() == 0


def test_of_the_overlong_penalty_and_the_mismatch() -> None:
    x = batch_of("grpo", 2)
    short = compacted(x)
    for n in (x.mask, short.mask):
        penalty = overlong_penalty(n.sum(-1), max_length=20, ramp=10)
        assert torch.equal(penalty, -((x.mask.sum(-1) - 10) / 10).clamp(0, 1))
    found, expected = (mismatch_metrics(b.proximal_logprobs, b.rollout_logprobs, b.mask) for b in (x, short))
    assert found == pytest.approx(expected, rel=1e-12)
    found, expected = (
        mismatch_by(b.proximal_logprobs, b.rollout_logprobs, b.mask, b.mask.to(torch.int64)) for b in (x, short)
    )
    assert found.keys() == expected.keys() == {1}
    assert found[1] == pytest.approx(expected[1], rel=1e-12)
