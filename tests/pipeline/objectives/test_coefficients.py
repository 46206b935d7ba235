"""T7: the gradient of every preset is the table's c_t."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.objectives import PRESETS, Denominators, LossInputs, ObjectiveConfig, resolve
from tests.support.batches import EDGES, loss_and_gradients, make_batch, rows, table_coefficients, whole
from tests.support.enumeration import coefficients

ALL = sorted(PRESETS)


def _coefficients(config: ObjectiveConfig, x: LossInputs) -> torch.Tensor:
    critic = {
        field: getattr(x, field) for field in ("values", "proximal_values", "returns") if getattr(x, field) is not None
    }
    return coefficients(
        resolve(config),
        x.current_logprobs,
        x.proximal_logprobs,
        x.rollout_logprobs,
        x.advantages,
        x.mask,
        **critic,
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("staleness", [1e-4, 0.3, 1.5])
def test_c_t_is_the_tables(name: str, staleness: float) -> None:
    for seed in range(20):
        x = make_batch(name, seed, staleness=staleness)
        torch.testing.assert_close(
            _coefficients(ObjectiveConfig(preset=name), x), table_coefficients(name, x), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("name", ALL)
def test_on_policy_every_coefficient_is_the_advantage_under_its_reduction(name: str) -> None:
    x = make_batch(name, 3, staleness=0.0, discrepancy=0.0)
    advantages = x.advantages if x.advantages.dim() == 2 else x.advantages[:, None]
    reduction = PRESETS[name].cells.reduction
    lengths = x.mask.sum(-1, keepdim=True).clamp(min=1) if reduction.startswith("sequence_mean") else 1
    if reduction == "sequence_mean_token_sum":
        lengths = 1
    expected = advantages / lengths * x.mask
    torch.testing.assert_close(_coefficients(ObjectiveConfig(preset=name), x), expected, rtol=1e-12, atol=1e-14)


def test_gspo_token_with_one_advantage_per_sequence_is_gspo() -> None:
    for seed in range(20):
        x = make_batch("gspo", seed, staleness=4e-4)
        denominators = whole(x)
        loss, gradients = loss_and_gradients("gspo", x, denominators)
        for advantages in (x.advantages, x.advantages[:, None].expand_as(x.mask).contiguous()):
            token_loss, token_gradients = loss_and_gradients(
                "gspo_token", replace(x, advantages=advantages), denominators
            )
            torch.testing.assert_close(token_loss, loss, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(token_gradients, gradients, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", sorted(EDGES))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_clip_takes_the_gradient_beyond_its_edge_and_on_one_side_only(name: str, sign: float) -> None:
    """One token; its ratio is put just inside and just outside each edge."""
    config = ObjectiveConfig(preset=name)
    for edge in EDGES[name]:
        upper = edge > 1
        coefficient = []
        for ratio in (edge * (1 - 1e-9), edge * (1 + 1e-9)):
            log_ratio = torch.tensor([[ratio]], dtype=torch.float64).log()
            zero = torch.zeros_like(log_ratio)
            x = make_batch(name, 0, sequences=1, tokens=1)
            x = replace(
                x,
                mask=torch.ones(1, 1, dtype=torch.bool),
                current_logprobs=log_ratio,
                proximal_logprobs=zero,
                rollout_logprobs=zero,
                advantages=torch.full_like(x.advantages, sign),
            )
            coefficient.append(_coefficients(config, x).item())
        inner, outer = coefficient if upper else coefficient[::-1]
        assert inner == pytest.approx(sign * edge, rel=1e-8)
        # CISPO bounds the weight and keeps the gradient; IcePop drops on either side whatever the sign of A.
        cut = (upper == (sign > 0) or name == "icepop") and name not in ("cispo", "scalerl")
        assert outer == pytest.approx(0.0 if cut else sign * edge, rel=1e-8)


def test_the_edge_itself_is_inside() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for ratio, sign in ((1.5, 1.0), (0.5, -1.0)):
        c = coefficients(
            resolve(ObjectiveConfig(preset="dr_grpo", clip_low=0.5, clip_high=0.5)),
            torch.tensor([[ratio]], dtype=torch.float64).log(),
            0 * one,
            0 * one,
            sign * one[:, 0],
            one.bool(),
        )
        assert c.item() == pytest.approx(sign * ratio, rel=1e-15)


def test_dual_clip_bounds_the_ratio_only_where_the_advantage_is_negative() -> None:
    config = ObjectiveConfig(preset="ppo", advantage="group_mean", surrogate="dual_clip", dual_clip=3.0)
    ratio = torch.tensor([[2.9, 3.1, 2.9, 3.1, 0.7, 1.1]], dtype=torch.float64)
    advantages = torch.tensor([[-2.0, -2.0, 2.0, 2.0, -2.0, -2.0]], dtype=torch.float64)
    zero = torch.zeros_like(ratio)
    x = LossInputs(ratio.log(), zero, zero, advantages, torch.ones_like(ratio, dtype=torch.bool))
    loss = resolve(config).loss(x, Denominators(1, 1, 1)).loss
    term = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    term = torch.where(advantages < 0, torch.maximum(term, 3.0 * advantages), term)
    assert -loss.item() == pytest.approx(term.sum().item(), rel=1e-14)
    c = _coefficients(config, x)
    torch.testing.assert_close(
        c, torch.tensor([[-5.8, 0.0, 0.0, 0.0, 0.0, -2.2]], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ALL)
def test_nothing_flows_into_what_is_constant(name: str) -> None:
    x = make_batch(name, 1)
    constants = {
        field: getattr(x, field).detach().requires_grad_()
        for field in ("proximal_logprobs", "rollout_logprobs", "advantages", "proximal_values", "returns")
        if getattr(x, field) is not None
    }
    out = resolve(ObjectiveConfig(preset=name)).loss(replace(x, **constants), whole(x))
    gradients = torch.autograd.grad(out.loss, list(constants.values()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    assert not any(metric.total.requires_grad or metric.count.requires_grad for metric in out.metrics.values())


@pytest.mark.parametrize("name", ALL)
def test_where_the_advantage_is_zero_term_and_gradient_are_zero(name: str) -> None:
    x = make_batch(name, 2, staleness=1.5)
    x = replace(x, advantages=torch.zeros_like(x.advantages))
    out = resolve(ObjectiveConfig(preset=name)).loss(x, whole(x))
    assert out.metrics["loss/policy"].value() == 0.0
    gradient = torch.autograd.grad(out.loss, x.current_logprobs)[0]
    assert (gradient.abs().max() == 0.0) == (name != "ipo")  # whose KL to mu asks for no advantage
    if name not in ("cispo", "scalerl"):  # their bound is on the ratio, whatever the advantage
        assert out.metrics["loss/clip_fraction"].total.item() == 0.0


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_empty_sequences_has_loss_and_gradient_zero(name: str) -> None:
    x = make_batch(name, 4)
    x = replace(x, mask=torch.zeros_like(x.mask))
    loss, gradients = loss_and_gradients(name, x, whole(x))
    assert loss.item() == 0.0
    assert all(gradient.abs().max() == 0.0 for gradient in gradients)


@pytest.mark.parametrize("name", ALL)
def test_a_part_without_sequences_or_without_columns_contributes_zero(name: str) -> None:
    x = make_batch(name, 4)
    for part in (rows(x, slice(0, 0)), _without_columns(x)):
        loss, _ = loss_and_gradients(name, part, whole(x))
        assert loss.item() == 0.0


def _without_columns(x: LossInputs) -> LossInputs:
    narrow = {
        field: value.detach()[:, :0].requires_grad_(value.requires_grad)
        for field, value in vars(x).items()
        if value is not None and value.dim() == 2
    }
    return replace(x, **narrow)
