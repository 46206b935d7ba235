"""A teacher's part of an objective: against its equations in plain float64, and over every sequence of a policy."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from pipeline.objectives import Denominators, LossInputs, ObjectiveConfig, resolve
from pipeline.objectives.objective import Objective
from pipeline.objectives.terms.distillation import top_term
from tests.pipeline.objectives.theory.policy import ALL, BASE, MU
from tests.support.enumeration import expected_gradient, logprobs, probabilities

TEACHER_LOGITS = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TEACHER = logprobs(TEACHER_LOGITS, ALL)
PREFIX = torch.cat([torch.zeros(len(MU), 1).double(), MU.cumsum(-1)[:, :-1]], 1).exp() * ALL.mask


def objective(**distillation) -> Objective:
    cells = {"preset": "dr_grpo", "reduction": "sequence_mean_token_sum", "distillation": distillation}
    return resolve(ObjectiveConfig.model_validate(cells))


def kl_of_prefixes(logits: Tensor, weights: Tensor, teacher: Tensor) -> Tensor:
    """sum over prefixes of their probability (constant) times the whole KL there."""
    mine, theirs = torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1)
    return (weights * (mine.exp() * (mine - theirs)).sum(-1)).sum()


def weights_of_prefixes() -> Tensor:
    """[rows]: with what probability a sequence of MU comes by each prefix."""
    weights = torch.zeros(ALL.rows).double()
    for row in range(ALL.rows):
        at = (ALL.prefixes == row) & ALL.mask
        weights[row] = (probabilities(MU)[:, None] * at).sum()
    return weights


def gradient(function, logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def advantages(gamma: float, reward: float = 0.0) -> Tensor:
    found = objective(gamma=gamma, reward=reward).advantages(
        torch.zeros(len(MU)).double(), torch.zeros(len(MU)), ALL.mask, proximal_logprobs=MU, teacher_logprobs=TEACHER
    )
    return found.advantages


def test_with_gamma_1_the_mean_gradient_of_the_advantage_is_that_of_the_kl_of_whole_answers() -> None:
    def kl(logits: Tensor) -> Tensor:
        mine = logprobs(logits, ALL)
        return (probabilities(mine) * (mine - TEACHER).sum(-1)).sum()

    found = expected_gradient(advantages(1.0), probabilities(MU), BASE, ALL)
    torch.testing.assert_close(found, -gradient(kl, BASE), rtol=0, atol=1e-14)


def test_with_gamma_0_it_is_that_of_each_tokens_kl_at_the_prefixes_as_they_come() -> None:
    found = expected_gradient(advantages(0.0), probabilities(MU), BASE, ALL)
    exact = gradient(lambda z: kl_of_prefixes(z, weights_of_prefixes(), TEACHER_LOGITS), BASE)
    torch.testing.assert_close(found, -exact, rtol=0, atol=1e-14)


def test_a_policy_that_is_its_own_teacher_has_no_advantage_and_no_loss() -> None:
    own = objective(reward=0.0)
    found = own.advantages(
        torch.rand(len(MU)).double(), torch.zeros(len(MU)), ALL.mask, proximal_logprobs=MU, teacher_logprobs=MU
    )
    assert torch.equal(found.advantages, torch.zeros_like(MU))
    out = loss_of(objective(place="loss"), MU, MU, teacher=MU)
    assert (out.metrics["teacher/kl"].value(), out.metrics["loss/teacher"].value()) == (0.0, 0.0)


def loss_of(own: Objective, current: Tensor, rollout: Tensor, *, teacher: Tensor, **more):
    zeros, ones = torch.zeros(len(MU)).double(), Denominators(sequences=1, tokens=1, max_length=1, prompts=1)
    inputs = LossInputs(current, current.detach(), rollout, zeros, ALL.mask, teacher_logprobs=teacher, **more)
    return own.loss(inputs, ones)


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_mean_gradient_of_the_sampled_term_is_that_of_each_tokens_kl(off_policy: bool) -> None:
    """Off policy the weight makes it so while no ratio is above its bound: the prefixes are those that mu samples."""
    logits = BASE + 0.3 * torch.randn(BASE.shape, generator=torch.Generator().manual_seed(2)) * off_policy
    own = objective(place="loss", max_weight=1e3)

    def mean(z: Tensor) -> Tensor:
        current = logprobs(z, ALL)
        per = [loss_of_row(own, current, i) for i in range(len(MU))]
        return (probabilities(MU) * torch.stack(per)).sum()

    exact = gradient(lambda z: kl_of_prefixes(z, weights_of_prefixes(), TEACHER_LOGITS), logits)
    torch.testing.assert_close(gradient(mean, logits), exact, rtol=0, atol=1e-13)


def loss_of_row(own: Objective, current: Tensor, i: int) -> Tensor:
    row = slice(i, i + 1)
    inputs = LossInputs(
        current[row],
        current[row].detach(),
        MU[row],
        torch.zeros(1).double(),
        ALL.mask[row],
        teacher_logprobs=TEACHER[row],
    )
    return own.loss(inputs, Denominators(sequences=1, tokens=1, max_length=1, prompts=1)).loss


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_top_k_form_is_the_kl_with_all_other_tokens_as_one_never_more_and_all_of_it_at_k_of_v_less_one(
    k: int,
) -> None:
    generator = torch.Generator().manual_seed(k)
    mine, theirs = (torch.randn(7, 4, generator=generator).double().log_softmax(-1) for _ in range(2))
    top = theirs.topk(k).indices
    found = top_term(mine.gather(1, top)[None], theirs.gather(1, top)[None], torch.ones(1, 7, dtype=torch.bool))[0]
    whole = (mine.exp() * (mine - theirs)).sum(-1)
    for row in range(7):  # in plain numbers
        p, q = mine[row].exp().tolist(), theirs[row].exp().tolist()
        inside = sum(p[v] * math.log(p[v] / q[v]) for v in top[row].tolist())
        rest = [1 - sum(x[v] for v in top[row].tolist()) for x in (p, q)]
        assert found[row].item() == pytest.approx(inside + rest[0] * math.log(rest[0] / rest[1]), abs=1e-12)
    assert (found <= whole + 1e-12).all()
    assert (found >= -1e-12).all()
    if k == 3:
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_forms_and_denominators_against_plain_numbers() -> None:
    """Two ragged answers with a hole, rewards beside the teacher, every number its own."""
    rng = random.Random(3)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    current, mu, teacher = (
        torch.tensor([[-rng.random() for _ in range(4)] for _ in range(2)]).double() for _ in range(3)
    )
    own = objective(place="loss", coefficient=0.7, max_weight=1.1, reward=0.5)
    taught = own.advantages(torch.tensor([1.0, 0.0]).double(), torch.zeros(2), mask).advantages
    assert taught.tolist() == [0.25, -0.25]
    out = own.loss(
        LossInputs(current, current, mu, taught, mask, teacher_logprobs=teacher), Denominators.of(mask, max_length=4)
    )
    expected = kl = 0.0
    for i, t in mask.nonzero().tolist():
        gap = (current[i, t] - teacher[i, t]).item()
        kl += gap / 4
        expected += 0.7 * min(math.exp((current[i, t] - mu[i, t]).item()), 1.1) * gap**2 / 2 / 4
    assert out.metrics["loss/teacher"].value() == pytest.approx(expected, rel=1e-12)
    assert out.metrics["teacher/kl"].value() == pytest.approx(kl, rel=1e-12)
    own = objective(coefficient=0.7, gamma=0.9, reward=2.0)
    found = own.advantages(
        torch.tensor([1.0, 0.0]).double(), torch.zeros(2), mask, proximal_logprobs=current, teacher_logprobs=teacher
    )
    gaps = (current - teacher)[0].tolist()
    last, middle = gaps[3], gaps[1] + 0.9 * gaps[3]
    first = gaps[0] + 0.9 * middle
    expected_rows = [
        [1 - 0.7 * first, 1 - 0.7 * middle, 0, 1 - 0.7 * last],
        [-1 - 0.7 * (current - teacher)[1, 0], 0, 0, 0],
    ]
    torch.testing.assert_close(found.advantages, torch.tensor(expected_rows).double(), rtol=0, atol=1e-12)


def test_nothing_flows_through_the_teacher_and_nothing_untrained_is_read() -> None:
    mask = torch.tensor([[True, False, True]])
    current = torch.tensor([[-0.5, float("nan"), -0.7]], requires_grad=True)
    top = torch.tensor([[[-0.4, -2.0], [float("nan")] * 2, [-0.9, -1.0]]], requires_grad=True)
    teacher = torch.tensor([[-0.2, float("nan"), -0.9]], requires_grad=True)
    told = torch.tensor([[[-0.3, -1.9], [float("nan")] * 2, [-0.8, -1.1]]], requires_grad=True)
    mu = torch.tensor([[-0.5, 0.0, -0.7]])
    for k in (0, 2):
        own = objective(place="loss", top_k=k)
        inputs = LossInputs(
            current, mu, mu, torch.zeros(1), mask,
            teacher_logprobs=teacher, current_top_logprobs=top, teacher_top_logprobs=told,
        )  # fmt: skip
        own.loss(inputs, Denominators.of(mask, max_length=3)).loss.backward()
    assert teacher.grad is None
    assert told.grad is None
    for found in (current.grad, top.grad):
        assert found is not None
        assert torch.isfinite(found).all()
        assert (found[:, 1] == 0).all()
        assert (found[:, 0] != 0).any()
