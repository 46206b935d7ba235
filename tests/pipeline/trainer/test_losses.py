"""What the loss reads of its rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.objectives import Denominators, KLConfig, ObjectiveConfig, resolve
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.trainer.losses import ON_POLICY, LossRow, critic_loss, policy_loss

GRPO = resolve(ObjectiveConfig(preset="grpo"))
CURRENT = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def row(n: int, proximal, advantage: np.ndarray | float = 1.0, **more) -> LossRow:
    return LossRow(np.full(n, -1.0, np.float32), proximal, advantage, **more)


def loss_of(rows, objective=GRPO, mask=MASK):
    current = CURRENT.clone().requires_grad_()
    batch = SimpleNamespace(
        quantities=(current, torch.zeros_like(current)), mask=mask, rows=tuple(rows), indices=(0, 1)
    )
    value, _ = policy_loss(objective, Denominators(2, int(mask.sum()), 3))(batch)
    (gradient,) = torch.autograd.grad(value, current)
    return value.detach(), gradient


def test_on_policy_is_said_and_is_what_the_current_log_probs_give():
    said = loss_of([row(3, ON_POLICY), row(1, ON_POLICY)])
    given = loss_of([row(3, CURRENT[0].numpy()), row(1, CURRENT[1, :1].numpy())])
    moved = loss_of([row(3, CURRENT[0].numpy() - 0.1), row(1, CURRENT[1, :1].numpy() - 0.1)])
    assert all(map(torch.equal, said, given))
    assert not torch.equal(said[0], moved[0])


def test_a_row_without_proximal_log_probs_cannot_be_made():
    with pytest.raises(TypeError, match="proximal_logprobs"):
        LossRow(rollout_logprobs=np.zeros(1, np.float32), advantage=1.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="proximal_logprob"):
        LossRow(np.zeros(1, np.float32), proximal_logprob=np.zeros(1), advantage=1.0)  # pyright: ignore[reportCallIssue]


def test_a_mini_batch_is_on_policy_or_is_not():
    with pytest.raises(ValueError, match="some rows of a mini-batch are on policy and some are not"):
        loss_of([row(3, ON_POLICY), row(1, CURRENT[1, :1].numpy())])


def test_what_the_objective_reads_is_in_every_row_and_as_long_as_the_response():
    with_kl = resolve(ObjectiveConfig(preset="grpo", kl=KLConfig(estimator="k3", beta=0.1)))
    reference = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="1 of 2 rows have what the loss reads"):
        loss_of([row(3, ON_POLICY, reference_logprobs=reference), row(1, ON_POLICY)], with_kl)
    with pytest.raises(ValueError, match="rows of up to 2 tokens for responses of up to 3"):
        loss_of([row(2, ON_POLICY), row(1, ON_POLICY)])


def test_advantages_by_token_and_by_sequence_give_the_same_where_they_are_equal():
    by_sequence = loss_of([row(3, ON_POLICY, 0.5), row(1, ON_POLICY, -1.0)])
    by_token = loss_of([row(3, ON_POLICY, np.full(3, 0.5, np.float32)), row(1, ON_POLICY, np.full(1, -1, np.float32))])
    assert torch.allclose(by_sequence[0], by_token[0])
    assert torch.allclose(by_sequence[1], by_token[1])


def test_a_token_that_was_not_sampled_has_no_gradient_and_counts_for_nothing():
    holes = torch.tensor([[True, False, True], [True, False, False]])
    _, gradient = loss_of([row(3, ON_POLICY), row(1, ON_POLICY)], mask=holes)
    assert (gradient[~holes] == 0).all()
    assert (gradient[holes] != 0).all()


def test_a_critic_needs_returns():
    values = CURRENT.clone().requires_grad_()
    ppo = resolve(ObjectiveConfig(preset="ppo"))
    batch = SimpleNamespace(
        quantities=(values,), mask=MASK, rows=(row(3, ON_POLICY), row(1, ON_POLICY)), indices=(0, 1)
    )
    with pytest.raises(ValueError, match="rows with returns"):
        critic_loss(ppo, Denominators(2, 4, 3))(batch)


def test_a_teachers_rows_become_its_term_of_the_sampled_and_of_the_named_tokens():
    """Both by hand: the policy is given as log-probs of three tokens, of which the teacher names two."""
    table = torch.tensor([0.5, 0.3, 0.2]).log().expand(2, 3, 3).clone()
    told = torch.tensor([0.7, 0.2]).log().numpy()
    rows = [
        row(n, ON_POLICY, 0.0, teacher=TeacherScores(np.full(n, -0.4, np.float32), np.tile(np.int32([0, 1]), (n, 1)),
                                                     np.tile(told, (n, 1))))
        for n in (3, 1)
    ]  # fmt: skip
    named = table[..., :2].clone().requires_grad_()
    batch = SimpleNamespace(quantities=(CURRENT, CURRENT, named), mask=MASK, rows=tuple(rows), indices=(0, 1))
    top, sampled = (
        resolve(ObjectiveConfig.model_validate({"preset": "grpo", "distillation": {"place": "loss", "top_k": k}}))
        for k in (2, 0)
    )
    value, metrics = policy_loss(top, Denominators(2, 4, 3))(batch)
    whole = (table[0, 0].exp() * (table[0, 0] - torch.tensor([0.7, 0.2, 0.1]).log())).sum()
    assert value.item() == pytest.approx(whole.item(), rel=1e-4)
    assert metrics["teacher/kl_top"][0] / metrics["teacher/kl_top"][1] == pytest.approx(whole.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(value, named)
    assert (gradient[MASK] != 0).all()
    assert (gradient[~MASK] == 0).all()
    value, _ = policy_loss(sampled, Denominators(2, 4, 3))(batch)
    weights = (CURRENT - torch.tensor([[-1.0] * 3, [-1.0, 0, 0]])).exp().clamp(max=5)
    expected = (weights * (CURRENT + 0.4).square() / 2)[MASK].mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
