"""A correction's default bounds leave a healthy batch alone: nearly nothing is dropped before any update.

Two engines that differ as published (k3 of 7.5e-4 and 1.5e-3): log-ratios pi_o/mu of mean -k3 and variance 2 k3.
"""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.objectives import LossInputs, ObjectiveConfig, resolve
from pipeline.objectives.correction_config import CORRECTION_BOUNDS, DROPS, CorrectionConfig
from tests.support.batches import prompt_tokens, whole

ANSWERS = 2000


def drops(kind: str) -> bool:
    """Whether a correction with its default bounds takes tokens or answers out."""
    return CorrectionConfig.model_validate({"kind": kind}).label in DROPS


def share_dropped(length: int, k3: float, **correction) -> float:
    """What the loss reports of answers of one length, half of them wrong, at pi = pi_o."""
    generator = torch.Generator().manual_seed(length)
    noise = torch.randn(ANSWERS, length, generator=generator)
    rollout = torch.full((ANSWERS, length), -1.0)
    current = rollout - k3 + math.sqrt(2 * k3) * noise
    advantages = torch.ones(ANSWERS)
    advantages[::2] = -1
    mask = torch.ones(ANSWERS, length, dtype=torch.bool)
    tokens = prompt_tokens(mask)
    x = LossInputs(current.requires_grad_(), current.detach(), rollout, advantages, mask, prompt_tokens=tokens)
    known = CorrectionConfig.model_validate(correction)
    config = ObjectiveConfig.model_validate({"preset": "grpo" if known.per_token else "gspo", "correction": correction})
    return resolve(config).loss(x, whole(x)).metrics[f"correction/{known.label}_cut"].value()


@pytest.mark.parametrize("length", [128, 512, 2048])
@pytest.mark.parametrize("k3", [7.5e-4, 1.5e-3])
@pytest.mark.parametrize("kind", [kind for kind in CORRECTION_BOUNDS if drops(kind) and kind != "sequence_mis"])
def test_the_defaults_drop_a_twentieth_at_most(kind: str, k3: float, length: int) -> None:
    assert share_dropped(length, k3, kind=kind) < 0.06


@pytest.mark.parametrize("length", [128, 512, 2048])
def test_a_product_over_an_answer_drops_an_eighth_whatever_its_length(length: int) -> None:
    assert share_dropped(length, 1.5e-3, kind="sequence_mis") < 0.14


def test_opsm_counts_the_wrong_answers_only_and_a_bound_of_1e_4_drops_most_of_them() -> None:
    assert share_dropped(512, 1.5e-3, kind="opsm", high=1e-4) == pytest.approx(0.718, abs=0.04)
    assert share_dropped(2048, 1.5e-3, kind="opsm", high=1e-4) == pytest.approx(0.876, abs=0.03)


def test_a_geometric_mask_of_a_thousandth_drops_most_answers() -> None:
    assert share_dropped(512, 7.5e-4, kind="geometric_mask", low=0.999, high=1.001) == pytest.approx(0.595, abs=0.04)
