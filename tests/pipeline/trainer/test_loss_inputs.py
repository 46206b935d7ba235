"""What the trainer hands to an objective: sampled tokens of a prompt, and the step's number of each sample."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.loop.update import Measured, loss_rows
from pipeline.objectives import Denominators, NonFiniteInput, NonFiniteRatio, ObjectiveConfig, resolve
from pipeline.step import Batch
from pipeline.trainer.losses import LossRow, critic_loss, policy_loss
from pipeline.types import Prompt
from tests.support.episodes import graded_group, plain_rollout

NUMBERS = (4, 5, 20, 21)
"""The step's numbers of the samples of one mini-batch."""


def micro_batch(quantities: int, **second) -> SimpleNamespace:
    """The mini-batch's samples 1 and 2, two tokens each. second: fields of the second one's row."""
    zeros = np.zeros(2, np.float32)
    plain = {"rollout_logprobs": zeros, "proximal_logprobs": zeros, "advantage": 1.0, "returns": zeros,
             "proximal_values": zeros}  # fmt: skip
    rows = (LossRow(**plain), LossRow(**(plain | second)))
    tensors = tuple(torch.zeros(2, 2, requires_grad=True) for _ in range(quantities))
    return SimpleNamespace(quantities=tensors, mask=torch.ones(2, 2, dtype=torch.bool), rows=rows, indices=(1, 2))


def test_a_broken_number_names_the_steps_sample_and_not_the_row_of_a_micro_batch() -> None:
    denominators = Denominators(sequences=4, tokens=8, max_length=2, prompts=2)
    broken = np.array([math.nan, 0], np.float32)
    policy = resolve(ObjectiveConfig(preset="grpo"))
    for row, kind in (({"advantage": math.inf}, NonFiniteInput), ({"proximal_logprobs": broken}, NonFiniteRatio)):
        with pytest.raises(kind, match=r"in sample 20$"):
            policy_loss(policy, denominators, NUMBERS)(micro_batch(2, **row))
        with pytest.raises(kind, match=r"in sample 2$"):
            policy_loss(policy, denominators)(micro_batch(2, **row))
    critic = resolve(ObjectiveConfig(preset="ppo"))
    with pytest.raises(NonFiniteInput, match=r"^returns is nan in sample 20$"):
        critic_loss(critic, denominators, NUMBERS)(micro_batch(1, returns=broken))


@pytest.mark.parametrize("name", ["dapo", "cispo", "grpo"])
def test_a_row_knows_the_tokens_of_its_prompt_where_the_reduction_reads_them(name: str) -> None:
    groups = []
    for lengths, rewards in (((3, 1), (1.0, 0.0)), ((2, 5), (0.0, 1.0))):
        rollouts = [plain_rollout(range(n), np.zeros(n)) for n in lengths]
        groups.append(graded_group(Prompt(np.zeros(1, np.int32), ""), rollouts, rewards))
    rows = loss_rows(
        resolve(ObjectiveConfig(preset=name)), Batch(1, 0, tuple(groups)), Measured(None), max_new_tokens=5
    )
    assert [row.prompt_tokens for row in rows] == ([None] * 4 if name == "grpo" else [4, 4, 7, 7])
