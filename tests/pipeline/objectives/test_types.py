from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.objectives.terms.critic import value_loss
from tests.support.batches import make_batch


def test_inputs_of_the_wrong_shape_or_mask_are_refused_by_name() -> None:
    x = make_batch("grpo", 0)
    for change, sentence in [
        ({"mask": x.mask.double()}, "bool"),
        ({"advantages": x.advantages[:-1]}, "advantages"),
        ({"rollout_logprobs": x.rollout_logprobs[:, :-1]}, "rollout_logprobs is"),
        ({"rollout_logprobs": x.rollout_logprobs.float()}, "rollout_logprobs is torch.float32"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            dataclasses.replace(x, **change)


def test_metrics_count_tokens_for_token_ratios_and_sequences_for_sequence_ratios() -> None:
    x = make_batch("grpo", 0, staleness=0.3)
    out = {}
    for name in ("grpo", "gspo"):
        out[name] = resolve(ObjectiveConfig(preset=name)).loss(x, Denominators.of(x.mask, 7)).metrics
    assert out["grpo"]["loss/clip_fraction"].count.item() == x.mask.sum().item()
    assert out["gspo"]["loss/clip_fraction"].count.item() == x.mask.any(-1).sum().item()
    log_r = (x.current_logprobs - x.proximal_logprobs).detach()
    A = x.advantages[:, None]
    cut = ((A > 0) & (log_r.exp() > 1.2)) | ((A < 0) & (log_r.exp() < 0.8))
    assert out["grpo"]["loss/clip_fraction"].total.item() == (cut & x.mask).sum().item() > 0
    assert out["grpo"]["ratio/mean"].value() == pytest.approx(log_r.exp()[x.mask].mean().item())
    assert out["grpo"]["ratio/max_abs_log"].value() == pytest.approx(log_r[x.mask].abs().max().item())


def test_the_value_loss_is_the_larger_of_two_squares_and_its_slope_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    values, start, returns = (torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(3))
    values = values.requires_grad_()
    for value_clip in (None, 0.2):
        value, slope = value_loss(values, returns, start, value_clip)
        squared = (values - returns) ** 2
        if value_clip is not None:
            squared = torch.maximum(squared, (start + (values - start).clamp(-0.2, 0.2) - returns) ** 2)
        torch.testing.assert_close(value, 0.5 * squared.detach())
        torch.testing.assert_close(slope, torch.autograd.grad(0.5 * squared.sum(), values)[0])
    with pytest.raises(ValueError, match="pass proximal_values"):
        value_loss(values, returns, None, 0.2)


def test_ppo_refuses_to_train_without_its_critic() -> None:
    x = dataclasses.replace(make_batch("ppo", 0), values=None)
    with pytest.raises(ValueError, match="pass values and returns"):
        resolve(ObjectiveConfig(preset="ppo")).loss(x, Denominators.of(x.mask, 7))
