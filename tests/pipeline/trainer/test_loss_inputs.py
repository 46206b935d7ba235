"""What the trainer hands to an objective: trained tokens of a prompt, and the step's number of each sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_ext.trainer import LossBatch
from pipeline.objectives import Denominators, NonFiniteInput, NonFiniteRatio, ObjectiveConfig, resolve
from pipeline.trainer.losses import critic_loss, policy_loss
from pipeline.trainer.rows import loss_values
from pipeline.types import Group, Prompt, Rollout

NUMBERS = (4, 5, 20, 21)
"""The step's numbers of the samples of one mini-batch."""


def micro_batch(quantities: int, **values: torch.Tensor) -> LossBatch:
    """The mini-batch's samples 1 and 2, two tokens each."""
    zeros = torch.zeros(2, 2)
    given = {"rollout_logprobs": zeros, "proximal_logprobs": zeros, "advantage": torch.tensor([1.0, -1.0])} | values
    tensors = tuple(torch.zeros(2, 2, requires_grad=True) for _ in range(quantities))
    return LossBatch(tensors, torch.ones(2, 2, dtype=torch.bool), given, indices=(1, 2))


def test_a_broken_number_names_the_steps_sample_and_not_the_row_of_a_micro_batch() -> None:
    denominators = Denominators(sequences=4, tokens=8, max_length=2, prompts=2)
    broken = torch.zeros(2, 2)
    broken[1, 0] = math.nan
    policy = resolve(ObjectiveConfig(preset="grpo"))
    for values, kind in (
        ({"advantage": torch.tensor([1.0, math.inf])}, NonFiniteInput),
        ({"proximal_logprobs": broken}, NonFiniteRatio),
    ):
        with pytest.raises(kind, match=r"in sample 20$"):
            policy_loss(policy, denominators, NUMBERS)(micro_batch(2, **values))
        with pytest.raises(kind, match=r"in sample 2$"):
            policy_loss(policy, denominators)(micro_batch(2, **values))
    critic = resolve(ObjectiveConfig(preset="ppo"))
    with pytest.raises(NonFiniteInput, match=r"^returns is nan in sample 20$"):
        critic_loss(critic, denominators, NUMBERS)(micro_batch(1, returns=broken, proximal_values=torch.zeros(2, 2)))


def rollout(tokens: int) -> Rollout:
    ids, zeros = np.zeros(tokens, np.int32), np.zeros(tokens, np.float32)
    return Rollout(ids[:1], ids, zeros, None, ids, "stop")


@pytest.mark.parametrize("name", ["dapo", "cispo", "grpo"])
def test_a_row_knows_the_tokens_of_its_prompt_where_the_reduction_reads_them(name: str) -> None:
    groups = [
        Group(Prompt(np.zeros(1, np.int32), ""), (rollout(3), rollout(1)), np.array([1.0, 0.0], np.float32)),
        Group(Prompt(np.zeros(1, np.int32), ""), (rollout(2), rollout(5)), np.array([0.0, 1.0], np.float32)),
    ]
    rows = loss_values(resolve(ObjectiveConfig(preset=name)), groups, max_new_tokens=5)
    assert [row.get("prompt_tokens") for row in rows] == ([None] * 4 if name == "grpo" else [4.0, 4.0, 7.0, 7.0])
