from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pipeline.objectives import PRESETS, NonFiniteRatio, ObjectiveConfig, resolve
from pipeline.objectives.terms.log_ratios import check_finite, sequence_log_ratio, token_log_ratio, trained
from tests.support.batches import make_batch, whole

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
WEIGHTS = MASK.double()


def test_a_log_ratio_is_zero_on_untrained_tokens_whatever_stands_there() -> None:
    numerator = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, math.inf, 9.0], [math.nan] * 3], dtype=torch.float64)
    denominator = torch.tensor([[-1.5, -2.5, 1.0], [-2.0, -math.inf, math.nan], [0.0] * 3], dtype=torch.float64)
    log_ratio = token_log_ratio(trained(numerator, MASK), trained(denominator, MASK), "a/b")
    assert log_ratio.tolist() == [[0.5, 0.5, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_gradient_of_a_log_ratio_does_not_reach_untrained_tokens() -> None:
    for junk in (5.0, math.nan):
        numerator = torch.full((3, 3), junk, dtype=torch.float64).masked_fill(MASK, -1.0).requires_grad_()
        log_ratio = token_log_ratio(trained(numerator, MASK), torch.zeros(3, 3, dtype=torch.float64), "a/b")
        assert torch.equal(torch.autograd.grad(log_ratio.sum(), numerator)[0], WEIGHTS)


def test_the_sequence_ratio_is_the_geometric_mean_and_one_without_tokens() -> None:
    log_ratio = torch.tensor([[0.3, -0.1, 0.0], [0.7, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    s = sequence_log_ratio(log_ratio, WEIGHTS.sum(-1, keepdim=True)).exp()
    assert s.flatten().tolist() == pytest.approx([math.sqrt(math.exp(0.3) * math.exp(-0.1)), math.exp(0.7), 1.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_broken_current_logprob_stops_every_preset_and_names_the_sequence(name: str, bad: float) -> None:
    x = make_batch(name, 0)
    current = x.current_logprobs.detach().clone()
    current[3, 0] = bad
    with pytest.raises(NonFiniteRatio, match="sequence 3") as caught:
        resolve(ObjectiveConfig(preset=name)).loss(replace(x, current_logprobs=current), whole(x, 7))
    assert caught.value.sequences == [3]
    assert caught.value.ratio.startswith("current/")


@pytest.mark.parametrize("name", [name for name in sorted(PRESETS) if PRESETS[name].cells.corrections])
def test_a_broken_rollout_logprob_stops_a_preset_that_reads_it(name: str) -> None:
    x = make_batch(name, 0)
    rollout = x.rollout_logprobs.clone()
    rollout[2, 0] = rollout[4, 0] = -math.inf
    with pytest.raises(NonFiniteRatio, match=r"/rollout is not finite .* in sequence 2, 4"):
        resolve(ObjectiveConfig(preset=name)).loss(replace(x, rollout_logprobs=rollout), whole(x, 7))


def test_overflow_is_that_of_the_dtype() -> None:
    check_finite(torch.tensor([[100.0]], dtype=torch.float64), "a/b")
    with pytest.raises(NonFiniteRatio, match="float32"):
        check_finite(torch.tensor([[0.0], [100.0]]), "a/b")
    check_finite(torch.tensor([[-1000.0]]), "a/b")  # a ratio of 0 is a finite number
    check_finite(torch.zeros(0, 3), "a/b")
