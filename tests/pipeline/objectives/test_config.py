from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from pipeline.objectives import PRESETS, CorrectionConfig, KLConfig, ObjectiveConfig, resolve
from tests.support.batches import make_batch, whole


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_without_overrides_is_its_row(name: str) -> None:
    objective = resolve(ObjectiveConfig(preset=name))
    assert objective.name == name
    assert objective.composition == PRESETS[name].cells


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("advantage", "leave_one_out"),
        ("reduction", "token_mean"),
        ("clip_high", 0.28),
        ("whiten", True),
        ("std_epsilon", 1e-3),
        ("entropy_coefficient", 0.01),
        ("dynamic_sampling", True),
        ("overlong_fraction", 0.1),
    ],
)
def test_one_cell_written_over_changes_that_cell_only(field: str, value: object) -> None:
    objective = resolve(ObjectiveConfig(preset="grpo", **{field: value}))
    assert objective.composition == dataclasses.replace(PRESETS["grpo"].cells, **{field: value})
    assert objective.name == "grpo*"


def test_corrections_and_kl_are_read_from_mappings_as_yaml_gives_them() -> None:
    config = ObjectiveConfig.model_validate(
        {"preset": "grpo", "correction": {"kind": "token_tis", "high": 3}, "kl": {"estimator": "k2", "beta": 0.1}}
    )
    cells = resolve(config).composition
    assert cells.corrections == (CorrectionConfig(kind="token_tis", high=3.0),)
    assert cells.kl == KLConfig(estimator="k2", beta=0.1)
    assert ObjectiveConfig.model_validate(config.model_dump()) == config


def test_zero_takes_the_kl_and_the_value_clip_away() -> None:
    config = ObjectiveConfig.model_validate({"preset": "reinforce_plus_plus", "kl": {"beta": 0}})
    assert resolve(config).composition.kl is None
    assert resolve(ObjectiveConfig(preset="ppo", value_clip=0)).composition.value_clip is None
    assert resolve(ObjectiveConfig(preset="m2po", second_moment=0)).composition.second_moment is None


def test_an_empty_list_takes_the_correction_away() -> None:
    cells = resolve(ObjectiveConfig(preset="areal_grpo", correction=[])).composition  # pyright: ignore[reportArgumentType]
    assert cells.corrections == ()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"preset": "gpro"}, "unknown preset 'gpro'; there are reinforce, rloo, "),
        ({"preset": "gspo", "correction": {"kind": "token_tis"}}, "write correction: {kind: geometric_tis}"),
        ({"preset": "gspo_token", "correction": {"kind": "icepop"}}, "a sequence_\\* kind, or ratio: token"),
        ({"preset": "gspo", "ratio": "token"}, "write clip_low and clip_high too, for example 0.2"),
        ({"preset": "grpo", "ratio": "sequence", "clip_low": 3e-4}, "write clip_high too, for example 3e-4"),
        ({"preset": "gmpo", "surrogate": "clip"}, "write clip_low and clip_high too"),
        ({"preset": "grpo", "reduction": "sequence_mean"}, "write reduction: sequence_mean_token_mean"),
        ({"preset": "grpo", "surrogate": "soft_gate"}, "needs tau_positive, and the preset has none"),
        ({"preset": "ppo", "surrogate": "dual_clip"}, "needs dual_clip"),
        ({"preset": "ppo", "surrogate": "dual_clip", "dual_clip": 0.5}, "write a number above 1"),
        ({"preset": "grpo", "surrogate": "log_space_clip", "clip_low": 0.4, "clip_high": 0.4}, "write ratio: sequence"),
        ({"preset": "gspo", "advantage": "gae"}, "write ratio: sequence_token"),
        (
            {"preset": "gspo", "advantage": "batch_std", "kl": {"place": "reward"}},
            "write ratio: sequence_token, or kl.place: loss",
        ),
        (
            {"preset": "grpo", "correction": {"kind": "token_tis", "numerator": "current"}},
            "write numerator: proximal, or surrogate: reinforce or mask",
        ),
        (
            {"preset": "grpo", "correction": [{"kind": "token_tis"}, {"kind": "sequence_tis"}]},
            "add only geometric_mask, opsm or reject beside it",
        ),
        ({"preset": "grpo", "clip_low": 1.5}, "write at most 1"),
        (
            {"preset": "grpo", "kl": {"estimator": "unbiased_k3", "place": "reward"}},
            "a number of the proximal policy, without a gradient and without mu; write kl.place: loss",
        ),
        (
            {"preset": "grpo", "ratio_to": "rollout", "correction": {"kind": "token_tis"}},
            r"write correction: \[\], or ratio_to: proximal",
        ),
        ({"preset": "areal_grpo", "ratio_to": "rollout"}, r"write correction: \[\]"),
        ({"preset": "grpo", "std": "unbiased"}, "'population' or 'sample'"),
        ({"preset": "grpo", "surrogate": "trust_region"}, "needs divergence, and the preset has none"),
        ({"preset": "dppo_tv", "ratio": "sequence_token"}, "write ratio: token"),
        ({"preset": "dppo_tv", "divergence": "tv"}, "'binary_tv' or 'binary_kl'"),
        ({"preset": "vespo", "ratio": "token"}, "write ratio: product and surrogate: gamma_gate together, or neither"),
        ({"preset": "reinforce", "ratio": "product"}, "write ratio: product and surrogate: gamma_gate together"),
        ({"preset": "gspo", "second_moment": 0.04}, r"or correction: \{kind: reject\} for whole answers"),
        ({"preset": "maxrl", "credit": "turn"}, "write advantage: group_mean, or credit: episode"),
        ({"preset": "grpo", "kl": {"place": "reward", "to": "rollout"}}, "write kl.place: loss, or kl.to: reference"),
        ({"preset": "grpo", "correction": {"kind": "reject", "by": "k2"}}, "write high too, in nats"),
        ({"preset": "grpo", "correction": {"kind": "reject", "low": -1.0}}, "bounds what is never below 0"),
        ({"preset": "grpo", "correction": {"kind": "token_tis", "over": "max"}}, "write kind: reject with them"),
        (
            {"preset": "gspo", "correction": {"kind": "reject", "by": "k2", "over": "token", "high": 0.1}},
            "write over: mean, sum or max, or ratio: token",
        ),
        (
            {"preset": "grpo", "correction": [{"kind": "reject"}, {"kind": "reject", "high": 0.1}]},
            "judge the same twice; keep the narrower one",
        ),
        ({"preset": "grpo", "clip": 0.2}, "clip"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_write(config: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ObjectiveConfig.model_validate(config)


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({"preset": "grpo"}, (False, False, False)),
        ({"preset": "ppo"}, (False, False, True)),
        ({"preset": "minirl"}, (True, False, False)),
        ({"preset": "areal_sapo"}, (True, False, False)),
        ({"preset": "gspo", "ratio_to": "rollout"}, (True, False, False)),
        ({"preset": "reinforce_plus_plus"}, (False, True, False)),
        ({"preset": "grpo", "kl": {"estimator": "unbiased_k3"}}, (True, True, False)),
        ({"preset": "gspo", "correction": {"kind": "opsm"}}, (True, False, False)),
        ({"preset": "ipo"}, (True, False, False)),
        ({"preset": "grpo", "kl": {"to": "rollout"}}, (True, False, False)),
        ({"preset": "grpo", "second_moment": 0.04}, (True, False, False)),
    ],
)
def test_an_objective_says_what_it_needs(config: dict, needs: tuple[bool, bool, bool]) -> None:
    objective = resolve(ObjectiveConfig.model_validate(config))
    cells = ObjectiveConfig.model_validate(config).composition()
    assert (cells.needs_rollout_logprobs, cells.needs_reference, cells.needs_critic) == needs
    assert (objective.needs_rollout_logprobs, objective.needs_reference, objective.needs_critic) == needs


def test_a_term_per_sequence_refuses_advantages_per_token() -> None:
    x = make_batch("ppo", 0)
    with pytest.raises(ValueError, match="ratio: sequence_token"):
        resolve(ObjectiveConfig(preset="gspo")).loss(x, whole(x, 7))


def test_sequence_token_takes_the_critics_advantages() -> None:
    x = make_batch("ppo", 0, staleness=1e-4)
    config = ObjectiveConfig(preset="gspo_token", advantage="gae")
    out = resolve(config).loss(x, whole(x, 7))
    log_r = (x.current_logprobs - x.proximal_logprobs) * x.mask
    n = x.mask.sum(-1, keepdim=True).clamp(min=1)
    s = (log_r.sum(-1, keepdim=True) / n).exp()
    token = s.detach() * (x.current_logprobs - x.current_logprobs.detach()).exp()
    clipped = torch.minimum(token * x.advantages, token.clamp(1 - 3e-4, 1 + 4e-4) * x.advantages)
    expected = torch.autograd.grad(-((clipped * x.mask).sum(-1) / n[:, 0]).mean(), x.current_logprobs)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, x.current_logprobs)[0], expected, rtol=1e-12, atol=1e-15)


def test_entropy_is_a_bonus_under_the_same_reduction() -> None:
    x = make_batch("dapo", 0)
    entropy = torch.rand(x.mask.shape, dtype=torch.float64).masked_fill(~x.mask, torch.nan).requires_grad_()
    x = dataclasses.replace(x, entropy=entropy)
    denominators = whole(x, 7)
    tokens = {"preset": "dapo", "reduction": "token_mean"}
    plain = resolve(ObjectiveConfig(**tokens)).loss(x, denominators)
    out = resolve(ObjectiveConfig(**tokens, entropy_coefficient=0.01)).loss(x, denominators)
    mean = entropy[x.mask].mean()
    assert (plain.loss - out.loss).item() == pytest.approx(0.01 * mean.item(), rel=1e-10)
    assert out.metrics["entropy"].value() == pytest.approx(mean.item())
    gradient = torch.autograd.grad(out.loss, entropy)[0]
    torch.testing.assert_close(gradient, -0.01 * x.mask.double() / x.mask.sum(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"inputs\.entropy"):
        resolve(ObjectiveConfig(preset="dapo", entropy_coefficient=0.01)).loss(
            dataclasses.replace(x, entropy=None), denominators
        )


def test_only_a_mean_per_prompt_reads_its_tokens_and_the_papers_rows_take_it() -> None:
    readers = {name for name in PRESETS if resolve(ObjectiveConfig(preset=name)).needs_prompt_tokens}
    assert readers == {"dapo", "cispo", "m2po", "scalerl"}
    assert resolve(ObjectiveConfig(preset="grpo", reduction="prompt_token_mean")).needs_prompt_tokens
    x = dataclasses.replace(make_batch("dapo", 0), prompt_tokens=None)
    with pytest.raises(ValueError, match="pass prompt_tokens"):
        resolve(ObjectiveConfig(preset="dapo")).loss(x, whole(x))


def test_the_population_std_is_the_default_of_every_row_but_areals() -> None:
    for name, preset in PRESETS.items():
        assert preset.cells.std == ("sample" if name.startswith("areal") else "population")


def test_pi_over_mu_is_the_ratio_of_a_term_that_asks_for_it() -> None:
    """The same loss as with mu's log-probs given for pi_o."""
    x = make_batch("grpo", 0)
    for preset in ("grpo", "gspo", "sapo", "cispo", "gmpo"):
        asked = resolve(ObjectiveConfig(preset=preset, ratio_to="rollout")).loss(x, whole(x)).loss
        given = dataclasses.replace(x, proximal_logprobs=x.rollout_logprobs)
        expected = resolve(ObjectiveConfig(preset=preset)).loss(given, whole(x)).loss
        assert torch.equal(asked, expected)
