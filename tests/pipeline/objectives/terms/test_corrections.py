from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.objectives import CorrectionConfig, Denominators, LossInputs, NonFiniteRatio, ObjectiveConfig, resolve
from pipeline.objectives.terms.corrections import Factor, correction_factor

LOG_W = torch.tensor(
    [[0.9, -0.9, 0.1, 0.0], [1.8, 0.2, 0.0, 0.0], [-0.0005, 0.0001, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
    dtype=torch.float64,
)
LENGTHS = torch.tensor([[3.0], [2.0], [2.0], [0.0]], dtype=torch.float64)
MASK = torch.arange(4)[None] < LENGTHS
WEIGHTS = MASK.double()
ADVANTAGES = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
W = LOG_W.exp()
SEQUENCE = LOG_W.sum(-1, keepdim=True).exp()
GEOMETRIC = (LOG_W.sum(-1, keepdim=True) / LENGTHS.clamp(min=1)).exp()


def _factor(**config) -> Factor:
    return correction_factor(CorrectionConfig(**config), LOG_W, MASK, ADVANTAGES)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "token_is"}, W),
        ({"kind": "token_tis"}, W.clamp(max=2)),
        ({"kind": "token_tis", "high": 1.05}, W.clamp(max=1.05)),
        ({"kind": "token_tis", "high": 0.9}, W.clamp(max=0.9)),  # a bound below 1 must not count padding
        ({"kind": "sequence_tis", "high": 0.9}, SEQUENCE.clamp(max=0.9)),
        ({"kind": "token_mis"}, W * (W <= 2)),
        ({"kind": "token_mis", "low": 0.5, "high": 3}, W * (W >= 0.5) * (W <= 3)),
        ({"kind": "icepop"}, W * (W >= 0.5) * (W <= 5)),
        ({"kind": "mean_mis"}, (W * (W <= 5) * WEIGHTS).sum(-1, keepdim=True) / LENGTHS.clamp(min=1)),
        ({"kind": "mean_mis", "high": 2}, (W * (W <= 2) * WEIGHTS).sum(-1, keepdim=True) / LENGTHS.clamp(min=1)),
        ({"kind": "sequence_is"}, SEQUENCE),
        ({"kind": "sequence_tis"}, SEQUENCE.clamp(max=2)),
        ({"kind": "sequence_mis"}, SEQUENCE * (SEQUENCE <= 2)),
        ({"kind": "geometric_is"}, GEOMETRIC),
        ({"kind": "geometric_tis", "high": 1.01}, GEOMETRIC.clamp(max=1.01)),
        ({"kind": "geometric_mask"}, ((GEOMETRIC >= 0.99) & (GEOMETRIC <= 1.01)).double()),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_factor_is_its_equation(config: dict, expected: Tensor) -> None:
    weight, cut, counted = _factor(**config)
    torch.testing.assert_close(weight, expected, rtol=1e-14, atol=0)
    kind = config["kind"]
    plain = {"token": W, "icepop": W, "mean": W, "sequence": SEQUENCE, "geometric": GEOMETRIC}[kind.split("_")[0]]
    beyond = plain > config.get("high", 5.0) if kind == "mean_mis" else (weight - plain).abs() > 1e-12
    if kind == "geometric_mask":
        beyond = weight == 0
    where = MASK if plain.shape == MASK.shape else LENGTHS > 0
    assert torch.equal(counted, where)
    assert torch.equal(cut & where, beyond & where)


def test_opsm_drops_a_bad_answer_that_the_policy_has_left() -> None:
    weight, cut, counted = _factor(kind="opsm", high=1e-4)
    # 0: A > 0. 1: pi above mu. 2: mean log(mu/pi) = 2e-4. 3: empty.
    assert weight.flatten().tolist() == [1.0, 1.0, 0.0, 1.0]
    assert cut.flatten().tolist() == [False, False, True, False]
    assert counted.flatten().tolist() == [False, True, True, False]  # of the wrong answers that have tokens
    assert _factor(kind="opsm", high=3e-4).weight.flatten().tolist() == [1.0, 1.0, 1.0, 1.0]
    assert CorrectionConfig(kind="opsm").numerator == "current"


def test_opsm_with_advantages_per_token_drops_only_the_bad_tokens() -> None:
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64).expand(4, 4)
    factor = correction_factor(CorrectionConfig(kind="opsm", high=1e-4), LOG_W, MASK, advantages)
    assert factor.weight[2].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert factor.counted[2].tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", ["sequence_tis", "sequence_mis", "geometric_tis", "geometric_mask"])
def test_a_product_over_thousands_of_tokens_neither_overflows_nor_becomes_nan(kind: str) -> None:
    log_w = torch.full((2, 4096), 0.5)
    log_w[1] *= -1
    mask = torch.ones(2, 4096, dtype=torch.bool)
    weight = correction_factor(CorrectionConfig(kind=kind), log_w, mask, torch.ones(2, 1)).weight
    expected = {
        "sequence_tis": [2.0, 0.0],
        "sequence_mis": [0.0, 0.0],
        "geometric_tis": [math.exp(0.5), math.exp(-0.5)],
    }
    assert weight.flatten().tolist() == pytest.approx(expected.get(kind, [0.0, 0.0]), rel=1e-6)


def test_an_unbounded_product_that_overflows_names_its_sequence() -> None:
    log_w = torch.zeros(3, 4096)
    log_w[1] = 0.5
    with pytest.raises(NonFiniteRatio, match=r"proximal/rollout \(sequence_is\) is not finite .* in sequence 1"):
        correction_factor(
            CorrectionConfig(kind="sequence_is"), log_w, torch.ones(3, 4096, dtype=torch.bool), torch.ones(3, 1)
        )


def _loss_and_gradient(x: LossInputs, **config) -> tuple[float, Tensor, dict]:
    out = resolve(ObjectiveConfig(**config)).loss(x, Denominators.of(x.mask, 4))
    (gradient,) = torch.autograd.grad(out.loss, x.current_logprobs)
    return out.loss.item(), gradient, {name: metric.value() for name, metric in out.metrics.items()}


def _batch(staleness: float = 0.1) -> LossInputs:
    generator = torch.Generator().manual_seed(0)
    rollout = torch.full((4, 4), -1.0, dtype=torch.float64)
    proximal = rollout + LOG_W
    current = proximal + staleness * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return LossInputs(current.requires_grad_(), proximal, rollout, ADVANTAGES[:, 0].clone(), WEIGHTS.bool())


def test_a_correction_multiplies_the_gradient_and_is_not_differentiated() -> None:
    x = _batch()
    _, plain, _ = _loss_and_gradient(x, preset="grpo")
    _, corrected, metrics = _loss_and_gradient(x, preset="grpo", correction={"kind": "token_tis"})
    torch.testing.assert_close(corrected, plain * W.clamp(max=2), rtol=1e-13, atol=0)
    tokens = WEIGHTS.sum().item()
    assert metrics["correction/token_tis_mean"] == pytest.approx((W.clamp(max=2) * WEIGHTS).sum().item() / tokens)
    assert metrics["correction/token_tis_cut"] == pytest.approx(2 / tokens)


def test_a_sequence_correction_multiplies_every_token_of_a_sequence() -> None:
    x = _batch(staleness=1e-4)
    _, plain, _ = _loss_and_gradient(x, preset="gspo")
    _, corrected, metrics = _loss_and_gradient(x, preset="gspo", correction={"kind": "geometric_is"})
    torch.testing.assert_close(corrected, plain * GEOMETRIC, rtol=1e-13, atol=0)
    assert metrics["correction/geometric_is_mean"] == pytest.approx(GEOMETRIC[:3].mean().item())


def test_corrections_in_a_list_are_multiplied() -> None:
    x = _batch()
    both = [{"kind": "token_tis"}, {"kind": "geometric_mask", "low": 0.9, "high": 1.1}]
    _, plain, _ = _loss_and_gradient(x, preset="grpo")
    _, corrected, _ = _loss_and_gradient(x, preset="grpo", correction=both)
    kept = (GEOMETRIC >= 0.9) & (GEOMETRIC <= 1.1)
    torch.testing.assert_close(corrected, plain * W.clamp(max=2) * kept, rtol=1e-13, atol=0)


def test_with_numerator_current_the_weight_is_the_whole_ratio_to_mu() -> None:
    x = _batch(staleness=0.5)
    rho = (x.current_logprobs - x.rollout_logprobs).exp().detach()
    _, gradient, _ = _loss_and_gradient(
        x, preset="reinforce", correction={"kind": "token_tis", "high": 1.5, "numerator": "current"}
    )
    expected = -rho.clamp(max=1.5) * ADVANTAGES * WEIGHTS / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)


def test_bounds_that_make_no_sense_are_refused() -> None:
    for config, sentence in [
        ({"kind": "token_mis", "low": 3.0}, "low 3.0 is above high 2.0"),
        ({"kind": "token_is", "high": 2.0}, "write kind: token_tis"),
        ({"kind": "token_tis", "low": 0.5}, "upper bound only"),
        ({"kind": "tis"}, "token_tis"),
    ]:
        with pytest.raises(ValidationError, match=sentence):
            CorrectionConfig(**config)
