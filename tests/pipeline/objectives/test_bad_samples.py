"""What stops an update, and that it names the sample."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.objectives import (
    PRESETS,
    BadSamples,
    LossInputs,
    NonFiniteInput,
    NonFiniteRatio,
    ObjectiveConfig,
    RunawayRatio,
    resolve,
)
from tests.support.batches import make_batch, whole

BAD = [math.nan, math.inf, -math.inf]
RUN = (40, 41, 42, 43, 44)
"""The caller's numbers of a batch's five sequences."""


def spoilt(matrix: Tensor, row: int, value: float) -> Tensor:
    """A copy with this value at one row's first token (make_batch's rows are not empty but for the first)."""
    matrix = matrix.detach().clone()
    matrix[row].view(-1)[0] = value
    return matrix


def loss_of(x: LossInputs, **config) -> Tensor:
    return resolve(ObjectiveConfig(**config)).loss(x, whole(x)).loss


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_an_advantage_that_is_no_number_stops_every_preset(name: str, bad: float) -> None:
    x = make_batch(name, 0)
    x = replace(x, advantages=spoilt(x.advantages, 3, bad), sample_ids=RUN)
    with pytest.raises(NonFiniteInput, match=f"^advantages is {bad} in sample 43$") as caught:
        loss_of(x, preset=name)
    assert caught.value.samples == [43]
    assert caught.value.sequences == [3]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("field", ["values", "returns", "proximal_values"])
def test_a_critics_number_that_is_none_names_its_field_and_sample(field: str, bad: float) -> None:
    x = make_batch("ppo", 0)
    x = replace(x, sample_ids=RUN, **{field: spoilt(getattr(x, field), 2, bad)})
    with pytest.raises(NonFiniteInput, match=f"^{field} is {bad} in sample 42$"):
        loss_of(x, preset="ppo")


@pytest.mark.parametrize("bad", BAD)
def test_an_entropy_that_is_no_number_names_its_sample(bad: float) -> None:
    x = make_batch("grpo", 0)
    x = replace(x, entropy=spoilt(torch.ones_like(x.proximal_logprobs), 4, bad), sample_ids=RUN)
    with pytest.raises(NonFiniteInput, match=f"^entropy is {bad} in sample 44$"):
        loss_of(x, preset="grpo", entropy_coefficient=0.1)
    loss_of(x, preset="grpo")  # it is not read


@pytest.mark.parametrize("bad", BAD)
def test_rewards_values_and_log_probs_of_the_advantages_are_checked(bad: float) -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    matrix = torch.zeros(4, 3)
    with pytest.raises(NonFiniteInput, match=f"the reward is {bad} in sequence 1"):
        resolve(ObjectiveConfig()).advantages(spoilt(rewards[:, None], 1, bad)[:, 0], ids, mask)
    with pytest.raises(NonFiniteInput, match=f"values is {bad} in sequence 2"):
        resolve(ObjectiveConfig(preset="ppo")).advantages(rewards, ids, mask, values=spoilt(matrix, 2, bad))
    objective = resolve(ObjectiveConfig(preset="reinforce_plus_plus"))
    with pytest.raises(NonFiniteRatio, match=r"reference/proximal is not finite .* in sequence 3"):
        objective.advantages(rewards, ids, mask, proximal_logprobs=matrix, reference_logprobs=spoilt(matrix, 3, bad))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_broken_log_prob_names_the_runs_sample(name: str) -> None:
    x = make_batch(name, 0)
    x = replace(x, current_logprobs=spoilt(x.current_logprobs, 1, math.nan), sample_ids=RUN)
    with pytest.raises(NonFiniteRatio, match=r"in sample 41$"):
        loss_of(x, preset=name)


@pytest.mark.parametrize("kind", [BadSamples, NonFiniteInput, NonFiniteRatio, RunawayRatio])
def test_an_error_comes_back_from_another_process_as_it_was(kind: type[BadSamples]) -> None:
    error = kind("current/proximal", [1, 3], "is not finite", RUN)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "current/proximal is not finite in sample 41, 43"
    assert (again.what, again.sequences, again.samples) == ("current/proximal", [1, 3], [41, 43])


# A ratio that nothing bounds


def one_token(log_ratio: float, advantage: float, dtype: torch.dtype = torch.float32, **fields: Tensor) -> LossInputs:
    """One response of one token, with this log pi/pi_o; mu is pi_o."""
    current = torch.tensor([[log_ratio]], dtype=dtype).requires_grad_()
    start = torch.zeros(1, 1, dtype=dtype)
    critic = dict.fromkeys(("proximal_values", "returns"), start) | {"values": start.clone().requires_grad_()}
    return LossInputs(
        current,
        start,
        start,
        torch.tensor([advantage], dtype=dtype),
        torch.ones(1, 1, dtype=torch.bool),
        prompt_tokens=torch.ones(1),
        sample_ids=(17,),
        **(critic | fields),
    )


BOUNDED = ("cispo", "sapo", "areal_sapo", "minirl", "dppo_tv", "dppo_kl", "ipo", "vespo", "icepop", "scalerl")
"""Presets whose weight is bounded for either sign of A."""


@pytest.mark.parametrize("log_ratio", [21.0, 40.0, 80.0])
@pytest.mark.parametrize("name", [name for name in sorted(PRESETS) if name not in BOUNDED])
def test_a_bad_answer_that_became_likely_is_named(name: str, log_ratio: float) -> None:
    """min(r A, clip(r) A) has no bound for A < 0; e^80 would be a finite gradient of 5e34."""
    x = one_token(log_ratio, -1.0)
    with pytest.raises(RunawayRatio, match=r"above the bound of e\^20, and nothing clips it in sample 17$") as caught:
        resolve(ObjectiveConfig(preset=name)).policy_loss(x, whole(x))
    assert caught.value.samples == [17]


@pytest.mark.parametrize("log_ratio", [21.0, 40.0, 80.0])
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bad_answer_that_became_likely_is_bounded(name: str, log_ratio: float) -> None:
    x = one_token(log_ratio, -1.0)
    loss = resolve(ObjectiveConfig(preset=name)).policy_loss(x, whole(x)).loss
    assert torch.autograd.grad(loss, x.current_logprobs)[0].abs().max() <= (20.0 if name == "dppo_kl" else 5.0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_ratio_that_a_clip_holds_stops_nothing(name: str) -> None:
    """A > 0: every clip is closed far above 1. REINFORCE, RLOO and M2PO have none."""
    x = one_token(60.0, 1.0)
    if name in ("reinforce", "rloo", "m2po"):
        with pytest.raises(RunawayRatio):
            loss_of(x, preset=name)
    else:
        loss = resolve(ObjectiveConfig(preset=name)).policy_loss(x, whole(x)).loss
        assert torch.autograd.grad(loss, x.current_logprobs)[0].abs().max() <= (20.0 if name == "dppo_kl" else 5.0)


def test_the_dual_clip_and_an_advantage_of_zero_bound_it() -> None:
    x = one_token(60.0, -1.0)
    config = {"preset": "grpo", "surrogate": "dual_clip", "dual_clip": 3.0}
    assert loss_of(x, **config).item() == pytest.approx(3.0)
    assert loss_of(one_token(60.0, 0.0), preset="grpo").item() == 0.0


@pytest.mark.parametrize("kind", ["token_is", "sequence_is", "geometric_is"])
def test_a_weight_without_a_bound_is_named_and_one_with_a_bound_is_not(kind: str) -> None:
    x = replace(one_token(0.0, 1.0), rollout_logprobs=torch.full((1, 1), -30.0))
    preset = "grpo" if kind == "token_is" else "gspo"
    with pytest.raises(RunawayRatio, match="sample 17"):
        loss_of(x, preset=preset, correction={"kind": kind})
    bounded = loss_of(x, preset=preset, correction={"kind": kind.replace("_is", "_tis")})
    assert bounded.item() == pytest.approx(-2.0)


@pytest.mark.parametrize(("estimator", "named"), [("k1", False), ("k2", False), ("k3", True), ("unbiased_k3", True)])
def test_a_kl_that_would_be_the_whole_gradient_is_named(estimator: str, named: bool) -> None:
    x = replace(one_token(0.0, 1.0), reference_logprobs=torch.full((1, 1), 50.0))
    config = {"preset": "grpo", "kl": {"estimator": estimator, "beta": 1e-3}}
    if not named:
        assert loss_of(x, **config).isfinite()
        return
    with pytest.raises(RunawayRatio, match=r"^reference/current is .* in sample 17$"):
        loss_of(x, **config)


def test_below_the_bound_nothing_is_stopped() -> None:
    x = one_token(19.9, -1.0, torch.float64)
    gradient = torch.autograd.grad(loss_of(x, preset="grpo"), x.current_logprobs)[0]
    assert gradient.item() == pytest.approx(math.exp(19.9), rel=1e-12)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_refused_by_name(dtype: torch.dtype) -> None:
    x = make_batch("ppo", 0)
    narrow = {name: t.to(dtype) for name, t in vars(x).items() if isinstance(t, Tensor) and t.is_floating_point()}
    with pytest.raises(ValueError, match=f"current_logprobs is {dtype}; an objective takes float32 or float64"):
        replace(x, **narrow)
    with pytest.raises(ValueError, match=f"advantages is {dtype}"):
        replace(x, advantages=x.advantages.to(dtype))
    objective = resolve(ObjectiveConfig(preset="ppo"))
    with pytest.raises(ValueError, match=f"rewards is {dtype}"):
        objective.advantages(torch.ones(5, dtype=dtype), torch.zeros(5), x.mask)
    assert x.values is not None
    assert x.returns is not None
    with pytest.raises(ValueError, match=f"values is {dtype}"):
        objective.value_loss(x.values.to(dtype), x.returns, x.proximal_values, x.mask, whole(x))


def test_whole_numbers_are_refused_where_a_number_is_trained_on() -> None:
    x = make_batch("grpo", 0)
    with pytest.raises(ValueError, match=r"advantages is torch\.int64"):
        replace(x, advantages=torch.ones(5, dtype=torch.int64))


def test_numbers_of_samples_and_prompts_belong_to_the_rows() -> None:
    x = make_batch("dapo", 0)
    with pytest.raises(ValueError, match="sample_ids has 2 numbers for 5 sequences"):
        replace(x, sample_ids=(1, 2))
    with pytest.raises(ValueError, match="prompt_tokens has 3 numbers for 5 sequences"):
        replace(x, prompt_tokens=torch.ones(3))
