"""What must hold for every preset and any batch: order, padding, partition, finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.parts import Metrics, add_metrics
from pipeline.objectives import PRESETS, Metric, ObjectiveConfig, resolve
from tests.support.batches import (
    BY_PROBABILITY,
    DISTINCT,
    EDGES,
    POTENTIALS,
    batches,
    loss_and_gradients,
    make_batch,
    rows,
    whole,
)
from tests.support.enumeration import coefficients

ALL = DISTINCT
STOPS_GRADIENTS = (
    "reinforce",
    "rloo",
    "cispo",
    "minirl",
    "gspo_token",
    "vespo",
    "icepop",
    "m2po",
    "scalerl",
    *BY_PROBABILITY,
)
EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ALL)
@EXAMPLES
@given(data=st.data())
def test_the_order_of_sequences_changes_nothing(name: str, data: st.DataObject) -> None:
    x = data.draw(batches(name))
    order = torch.tensor(data.draw(st.permutations(range(len(x.mask)))))
    loss, gradients = loss_and_gradients(name, x, whole(x))
    shuffled_loss, shuffled = loss_and_gradients(name, rows(x, order), whole(x))
    torch.testing.assert_close(shuffled_loss, loss, rtol=1e-12, atol=1e-13)
    for a, b in zip(shuffled, gradients, strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("name", ALL)
@EXAMPLES
@given(data=st.data())
def test_what_stands_in_padding_and_how_wide_it_is_changes_nothing(name: str, data: st.DataObject) -> None:
    x = data.draw(batches(name))
    width = data.draw(st.integers(0, 3))
    junk = data.draw(st.sampled_from([0.0, -7.5, 1e6, float("inf"), float("-inf"), float("nan")]))

    def padded(value: Tensor) -> Tensor:
        fill = False if value.dtype == torch.bool else junk
        wide = torch.cat([value.detach(), torch.full((len(value), width), fill, dtype=value.dtype)], 1)
        where = torch.nn.functional.pad(x.mask, (0, width))
        return wide if value.dtype == torch.bool else torch.where(where, wide, junk)

    wide = {
        field: padded(value).requires_grad_(value.requires_grad)
        for field, value in vars(x).items()
        if value is not None and value.dim() == 2
    }
    loss, gradients = loss_and_gradients(name, x, whole(x))
    wide_loss, wide_gradients = loss_and_gradients(name, replace(x, **wide), whole(x))
    torch.testing.assert_close(wide_loss, loss, rtol=1e-12, atol=1e-13)
    for a, b in zip(wide_gradients, gradients, strict=True):
        torch.testing.assert_close(a, torch.nn.functional.pad(b, (0, width)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
@EXAMPLES
@given(data=st.data())
def test_losses_gradients_and_metrics_of_any_partition_add_up(name: str, data: st.DataObject) -> None:
    x = data.draw(batches(name))
    part_of = torch.tensor([data.draw(st.integers(0, 2)) for _ in range(len(x.mask))])
    objective = resolve(ObjectiveConfig(preset=name))
    together = objective.loss(x, whole(x))
    parts = [objective.loss(rows(x, part_of == part), whole(x)) for part in range(3)]
    torch.testing.assert_close(sum(part.loss for part in parts), together.loss, rtol=1e-12, atol=1e-13)
    _, gradients = loss_and_gradients(name, x, whole(x))
    for part in range(3):
        _, share = loss_and_gradients(name, rows(x, part_of == part), whole(x))
        for a, b in zip(share, gradients, strict=True):
            torch.testing.assert_close(a, b[part_of == part], rtol=1e-13, atol=1e-16)
    merged: Metrics = {}
    for part in parts:
        add_metrics(merged, {key: (float(m.total), float(m.count), m.kind) for key, m in part.metrics.items()})
    assert merged.keys() == together.metrics.keys()
    for key, metric in together.metrics.items():
        total, count, kind = merged[key]
        value = Metric(*(torch.tensor(x, dtype=torch.float64) for x in (total, count)), kind).value()
        assert value == pytest.approx(metric.value(), rel=1e-10, abs=1e-12, nan_ok=True), key


@pytest.mark.parametrize("name", [name for name in ALL if name in POTENTIALS])
@EXAMPLES
@given(data=st.data())
def test_the_gradient_is_the_finite_difference_of_the_objective(name: str, data: st.DataObject) -> None:
    """Of the term itself, or where the term stops gradients, of the function whose derivative is its coefficient."""
    x = data.draw(batches(name))
    critic = {
        field: getattr(x, field) for field in ("values", "proximal_values", "returns") if getattr(x, field) is not None
    }
    objective = resolve(ObjectiveConfig(preset=name))
    c = coefficients(
        objective, x.current_logprobs, x.proximal_logprobs, x.rollout_logprobs, x.advantages, x.mask, **critic
    )
    log_r = (x.current_logprobs - x.proximal_logprobs).detach()
    log_w = x.proximal_logprobs - x.rollout_logprobs
    A = x.advantages if x.advantages.dim() == 2 else x.advantages[:, None]
    mask = x.mask.to(A)
    N = mask.sum(-1)
    h = 1e-6
    smooth = _away_from_kinks(name, log_r, log_w, mask, N)
    for t in range(mask.shape[1]):
        step = torch.zeros_like(log_r)
        step[:, t] = h
        up, down = (POTENTIALS[name](log_r + sign * step, log_w, A, mask, N) for sign in (1, -1))
        difference = (up - down) / (2 * h)
        scale = 1 + c.abs().amax(-1)
        assert ((difference - c[:, t]).abs() / scale)[smooth].lt(1e-7).all()


@pytest.mark.parametrize("name", [name for name in ALL if name not in STOPS_GRADIENTS])
@EXAMPLES
@given(data=st.data())
def test_the_gradient_is_the_finite_difference_of_the_loss_it_reports(name: str, data: st.DataObject) -> None:
    x = data.draw(batches(name))
    objective = resolve(ObjectiveConfig(preset=name))
    loss, gradients = loss_and_gradients(name, x, whole(x))
    mask = x.mask.to(loss)
    log_r = (x.current_logprobs - x.proximal_logprobs).detach()
    smooth = _away_from_kinks(name, log_r, x.proximal_logprobs - x.rollout_logprobs, mask, mask.sum(-1))
    h = 1e-6
    for s in smooth.nonzero().flatten().tolist():
        for t in range(int(mask[s].sum())):
            step = torch.zeros_like(log_r)
            step[s, t] = h
            up, down = (
                objective.loss(replace(x, current_logprobs=x.current_logprobs + sign * step), whole(x)).loss.detach()
                for sign in (1, -1)
            )
            scale = 1 + gradients[0].abs().max().item() + abs(loss.item())
            assert ((up - down) / (2 * h)).item() == pytest.approx(gradients[0][s, t].item(), abs=1e-7 * scale)


def _away_from_kinks(name: str, log_r: Tensor, log_w: Tensor, mask: Tensor, N: Tensor) -> Tensor:
    """[S] bool: no ratio of the sequence is within 1e-5 of an edge, in logs."""
    log_level = [log_r * mask]
    if name in ("icepop", "scalerl"):
        log_level = [(log_r + log_w) * mask]
    if PRESETS[name].cells.ratio == "sequence" and name != "gmpo":
        log_level = [((log_r * mask).sum(-1) / N.clamp(min=1))[:, None]]
    if name == "minirl":
        log_level.append((log_r + log_w) * mask)
    smooth = torch.ones(len(mask), dtype=torch.bool)
    for level in log_level:
        for edge in (*EDGES.get(name, ()), *((5.0,) if name == "minirl" else ())):
            smooth &= ((level - torch.tensor(edge, dtype=level.dtype).log()).abs() > 1e-5).all(-1)
    return smooth


@pytest.mark.parametrize("name", ALL)
def test_in_float32_micro_batches_add_up_to_1e6(name: str) -> None:
    x = make_batch(name, 0, sequences=16, tokens=64, staleness=0.05, discrepancy=0.02, dtype=torch.float32)
    together, gradients = loss_and_gradients(name, x, whole(x))
    for size in (1, 2, 4):
        shares = [loss_and_gradients(name, rows(x, slice(i, i + size)), whole(x)) for i in range(0, 16, size)]
        assert sum(share.item() for share, _ in shares) == pytest.approx(together.item(), rel=1e-6, abs=1e-6)
        for k, gradient in enumerate(gradients):
            torch.testing.assert_close(torch.cat([g[k] for _, g in shares]), gradient, rtol=1e-6, atol=1e-9)
