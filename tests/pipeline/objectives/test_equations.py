"""Every row, correction, KL, reduction and advantage against its equation in tests/support/plain.py, answer by answer.

The batches have untrained tokens between trained ones, which hold nan; the equations see the trained tokens only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from pipeline.objectives import PRESETS, LossInputs, ObjectiveConfig, resolve
from pipeline.objectives.cells import (
    Advantage,
    CorrectionKind,
    Divergence,
    KLEstimator,
    RatioLevel,
    Reduction,
    RejectBy,
    RejectOver,
    Surrogate,
)
from pipeline.objectives.correction_config import MASKS_ONLY
from tests.support import plain, plain_advantages
from tests.support.batches import leaves, loss_and_gradients, make_batch, whole

SEEDS = range(12)
ADVANTAGES = {"group_mean", "group_std", "leave_one_out", "mean_relative", "batch_scaled", "batch_std", "gae"}
"""Those that the tests below hold against plain.py."""


def answers_of(x: LossInputs) -> tuple[list[plain.Answer], plain.Sizes]:
    """The trained tokens of each sequence; their gradients go into x's own leaves."""
    answers = []
    for i, where in enumerate(x.mask):

        def row(matrix, where=where, i=i):
            return None if matrix is None else matrix[i][where]

        pi, old, mu = row(x.current_logprobs), row(x.proximal_logprobs), row(x.rollout_logprobs)
        assert pi is not None
        assert old is not None
        assert mu is not None
        A = x.advantages[i] if x.advantages.dim() == 1 else x.advantages[i][where]
        extras = [row(m) for m in (x.reference_logprobs, x.entropy, x.values, x.proximal_values, x.returns)]
        assert x.prompt_tokens is not None
        answers.append(plain.Answer(pi, old, mu, A, *extras, prompt_tokens=int(x.prompt_tokens[i])))
    d = whole(x)
    assert d.prompts is not None
    return answers, plain.Sizes(d.sequences, d.tokens, d.prompts, d.max_length)


def assert_same(name: str, x: LossInputs, cells: dict, equation: dict) -> torch.Tensor:
    """Loss and gradients are the equation's, and no gradient reaches an untrained token. Returns log pi's gradient."""
    loss, gradients = loss_and_gradients(name, x, whole(x), **cells)
    expected = plain.loss(name, *answers_of(x), **equation)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    theirs = torch.autograd.grad(expected, leaves(x))
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
        assert torch.equal(a[~x.mask], torch.zeros_like(a[~x.mask]))
    return gradients[0]


def test_nothing_is_without_an_equation() -> None:
    assert set(plain.ROWS) == set(plain_advantages.ROWS) == set(PRESETS)
    assert set(plain.CORRECTIONS) == set(plain.DEFAULT_BOUNDS) == set(get_args(CorrectionKind))
    assert set(plain.KLS) == set(get_args(KLEstimator))
    assert set(plain.REDUCTIONS) == set(get_args(Reduction))
    assert set(get_args(Advantage)) == ADVANTAGES
    cells = [resolve(ObjectiveConfig(preset=name)).composition for name in PRESETS]
    cells += [resolve(ObjectiveConfig(preset=row, **over)).composition for row, over, _ in plain.WRITTEN_OVER.values()]
    assert {cell.surrogate for cell in cells} == set(get_args(Surrogate))
    assert {cell.ratio for cell in cells} == set(get_args(RatioLevel))
    assert {cell.divergence for cell in cells} == {None, *get_args(Divergence)}
    assert {(cell.surrogate, cell.ratio_to) for cell in cells} >= {
        (surrogate, to)
        for surrogate in ("clip", "soft_gate", "stop_gradient_clip", "trust_region", "gamma_gate")
        for to in ("proximal", "rollout")
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize(("staleness", "discrepancy"), [(1e-4, 0.02), (0.3, 0.05), (1.5, 1.5)])
def test_a_row_is_its_equation(name: str, staleness: float, discrepancy: float) -> None:
    moved = 0.0
    for seed in SEEDS:
        x = make_batch(name, seed, staleness=staleness, discrepancy=discrepancy, holes=True)
        moved += assert_same(name, x, {}, {}).abs().sum().item()
    assert moved > 0


@pytest.mark.parametrize("what", sorted(plain.WRITTEN_OVER))
def test_a_cell_that_no_row_has_is_its_equation(what: str) -> None:
    name, cells, term = plain.WRITTEN_OVER[what]
    differs = False
    for seed in SEEDS:
        x = make_batch(name, seed, discrepancy=0.3, holes=True)
        assert_same(name, x, cells, {"term": term})
        differs |= bool(
            abs(loss_and_gradients(name, x, whole(x))[0] - plain.loss(name, *answers_of(x), term=term)) > 1e-6
        )
    assert differs


def rows_that_take(kind: str, numerator: str) -> list[str]:
    """Presets whose own correction is none and that a correction goes with."""
    rows = []
    for name, preset in PRESETS.items():
        cells = {"correction": {"kind": kind, "numerator": numerator}}
        try:
            ObjectiveConfig(preset=name, **cells)
        except ValueError:
            continue
        if not preset.cells.corrections:
            rows.append(name)
    return rows


@pytest.mark.parametrize("numerator", ["proximal", "current"])
@pytest.mark.parametrize("kind", get_args(CorrectionKind))
def test_a_correction_is_its_equation_on_every_row_that_takes_it(kind: str, numerator: str) -> None:
    names = rows_that_take(kind, numerator)
    assert names or (numerator == "current" and kind not in MASKS_ONLY)
    for name in names:
        for discrepancy in (0.005, 0.05, 1.0):
            x = make_batch(name, 5, staleness=3e-4, discrepancy=discrepancy, holes=True)
            if kind == "opsm" and x.advantages.dim() == 2:
                continue  # its equation has one A an answer; test_corrections.py has the tokens
            cells = {"correction": {"kind": kind, "numerator": numerator}}
            assert_same(name, x, cells, {"corrections": ((kind, numerator),)})


@pytest.mark.parametrize("kind", [kind for kind in get_args(CorrectionKind) if kind not in MASKS_ONLY])
def test_a_weight_by_pi_over_mu_is_the_policy_gradients_whole_weight(kind: str) -> None:
    """REINFORCE's term is sg[weight] A log pi: with the ratio to mu in the correction there is no other."""
    for seed in SEEDS:
        x = make_batch("reinforce", seed, holes=True)
        _, (gradient,) = loss_and_gradients("reinforce", x, whole(x), correction={"kind": kind, "numerator": "current"})
        for i, y in enumerate(answers_of(x)[0]):
            if y.N:
                weight = plain.CORRECTIONS[kind](plain.sg(plain.rho(y)), y.A, *plain.DEFAULT_BOUNDS[kind])
                expected = -(weight * y.A / len(x.mask)).expand(y.N)
                torch.testing.assert_close(gradient[i][x.mask[i]], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("numerator", ["proximal", "current"])
@pytest.mark.parametrize("over", get_args(RejectOver))
@pytest.mark.parametrize("by", get_args(RejectBy))
def test_a_rejection_is_its_equation_and_drops_some_and_not_all(by: str, over: str, numerator: str) -> None:
    bounds = {"low": -0.05 if by == "k1" else None, "high": 0.05 if by == "k1" else 3e-3}
    kept = []
    for seed in range(6):
        x = make_batch("grpo", seed, staleness=0.03, discrepancy=0.06, holes=True)

        def factor(y: plain.Answer) -> torch.Tensor:
            ratio = plain.sg(torch.exp((y.old if numerator == "proximal" else y.pi) - y.mu))
            kept.extend(plain.rejection(by, over, ratio, **bounds).flatten().tolist())
            return plain.rejection(by, over, ratio, **bounds)

        cells = {"correction": {"kind": "reject", "by": by, "over": over, "numerator": numerator, **bounds}}
        assert_same("grpo", x, cells, {"factor": factor})
    assert 0 < sum(kept) < len(kept)


def test_two_corrections_are_the_product_of_their_factors() -> None:
    both = ("reject", "geometric_tis")
    cells = {"correction": [{"kind": kind, "high": plain.DEFAULT_BOUNDS[kind][1]} for kind in both]}
    for seed in SEEDS:
        x = make_batch("gspo", seed, staleness=3e-4, discrepancy=0.15, holes=True)
        assert_same("gspo", x, cells, {"corrections": tuple((kind, "proximal") for kind in both)})


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
@pytest.mark.parametrize("name", ["grpo", "gspo", "minirl"])
def test_a_kl_to_mu_is_its_equation(name: str, estimator: str) -> None:
    x = make_batch(name, 1, staleness=0.05, holes=True)
    kl = {"estimator": estimator, "beta": 0.3, "to": "rollout"}
    loss, (gradient,) = loss_and_gradients(name, x, whole(x), kl=kl)
    same = replace(x, reference_logprobs=x.rollout_logprobs)
    expected = plain.loss(name, *answers_of(same), kl=(estimator, 0.3))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    (theirs,) = torch.autograd.grad(expected, leaves(x))
    torch.testing.assert_close(gradient, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_kl_in_the_loss_is_its_equation_on_every_row(name: str, estimator: str) -> None:
    kl = {"estimator": estimator, "beta": 0.3, "place": "loss"}
    for seed in range(3):
        x = make_batch(name, seed, staleness=0.05, holes=True)
        moved = 0.4 * torch.randn(x.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = replace(x, reference_logprobs=x.proximal_logprobs + moved)
        assert_same(name, x, {"kl": kl}, {"kl": (estimator, 0.3)})


@pytest.mark.parametrize("reduction", [r for r in get_args(Reduction) if r != "sequence_mean"])
@pytest.mark.parametrize("name", ["grpo", "sapo", "cispo", "minirl", "dr_gspo", "ppo"])
def test_a_reduction_is_its_equation_for_the_term_the_kl_the_entropy_and_the_critic(name: str, reduction: str) -> None:
    for seed in range(4):
        x = make_batch(name, seed, holes=True)
        entropy = (-x.proximal_logprobs.clone()).requires_grad_()
        x = replace(x, reference_logprobs=x.proximal_logprobs - 0.2, entropy=entropy)
        cells = {
            "reduction": reduction,
            "kl": {"estimator": "k3", "beta": 0.1, "place": "loss"},
            "entropy_coefficient": 0.02,
        }
        assert_same(name, x, cells, {"reduction": reduction, "kl": ("k3", 0.1), "entropy": 0.02})


# Advantages


REWARDS = [1.0, 0.0, 0.25, 2.0, -1.0, 3.0, 0.5]
PROMPTS = [7, 3, 7, 3, 3, 7, 7]
MASK = torch.tensor(
    [
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 1],
        [0, 1, 1, 0, 0, 0],
    ],
    dtype=torch.bool,
)
LENGTHS = MASK.sum(-1).tolist()


def _matrix(seed: int) -> torch.Tensor:
    values = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.masked_fill(~MASK, torch.nan)


PROXIMAL, REFERENCE, VALUES = _matrix(0), _matrix(1), _matrix(2)


def _advantages(**config):
    return resolve(ObjectiveConfig(**config)).advantages(
        torch.tensor(REWARDS, dtype=torch.float64),
        torch.tensor(PROMPTS),
        MASK,
        proximal_logprobs=PROXIMAL,
        reference_logprobs=REFERENCE,
        values=VALUES,
    )


def _assert_tokens(found: torch.Tensor, expected: list[list[float]]) -> None:
    """found: [S, T], or [S] for the same number at each token."""
    rows = found if found.dim() == 2 else found[:, None].expand_as(MASK)
    for i, row in enumerate(expected):
        assert rows[i][MASK[i]].tolist() == pytest.approx(row, rel=1e-11, abs=1e-13), i
    if found.dim() == 2:
        assert found[~MASK].abs().max() == 0


def _repeated(numbers: list[float]) -> list[list[float]]:
    return [[a] * n for a, n in zip(numbers, LENGTHS, strict=True)]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("std", ["population", "sample"])
@pytest.mark.parametrize("advantage", sorted(ADVANTAGES - {"batch_std", "gae"}))
def test_an_advantage_of_a_group_is_its_equation(advantage: str, std: str, whiten: bool) -> None:
    out = _advantages(preset="grpo", advantage=advantage, std=std, whiten=whiten).advantages
    expected = _repeated(getattr(plain_advantages, advantage)(REWARDS, PROMPTS, std=std))
    _assert_tokens(out, plain_advantages.whiten(expected, std) if whiten else expected)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_rows_advantage_is_its_equation_from_the_rewards_on(name: str) -> None:
    rollout = PROXIMAL + 0.6 * _matrix(3)
    found = resolve(ObjectiveConfig(preset=name)).advantages(
        torch.tensor(REWARDS, dtype=torch.float64),
        torch.tensor(PROMPTS),
        MASK,
        proximal_logprobs=PROXIMAL,
        reference_logprobs=REFERENCE,
        rollout_logprobs=rollout,
        values=VALUES,
    )
    k1, V, log_w = (
        [row[where].tolist() for row, where in zip(matrix, MASK, strict=True)]
        for matrix in (PROXIMAL - REFERENCE, VALUES, PROXIMAL - rollout)
    )
    expected = plain_advantages.ROWS[name](plain_advantages.Batch(REWARDS, PROMPTS, k1, V, log_w))
    _assert_tokens(found.advantages, expected)
    if name == "m2po":
        assert 0 < sum(a == 0 for row in expected for a in row) < MASK.sum()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
def test_a_kl_in_the_reward_counts_trained_tokens_for_every_advantage(advantage: str, estimator: str) -> None:
    kl = {"estimator": estimator, "beta": 0.3, "place": "reward"}
    found = _advantages(preset="ppo", advantage=advantage, kl=kl)
    penalties = []
    for i, where in enumerate(MASK):
        y = plain.Answer(PROXIMAL[i][where], *([torch.zeros(0)] * 3), reference=REFERENCE[i][where])
        penalties.append([0.3 * k for k in plain.KLS[estimator](y).tolist()])
    if advantage == "gae":
        values = [VALUES[i][where].tolist() for i, where in enumerate(MASK)]
        expected = [
            plain_advantages.gae(reward, p, v, 1.0, 0.95)
            for reward, p, v in zip(REWARDS, penalties, values, strict=True)
        ]
        assert found.returns is not None
        returns = [[a + b for a, b in zip(row, v, strict=True)] for row, v in zip(expected, values, strict=True)]
        _assert_tokens(found.returns, returns)
    elif advantage == "batch_std":
        expected = plain_advantages.whiten(
            [plain_advantages.rewards_to_go(r, p) for r, p in zip(REWARDS, penalties, strict=True)]
        )
    else:
        penalised = [r - sum(p) for r, p in zip(REWARDS, penalties, strict=True)]
        expected = _repeated(getattr(plain_advantages, advantage)(penalised, PROMPTS))
    _assert_tokens(found.advantages, expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_steps_over_untrained_tokens_and_discounts_nothing_there(gamma: float, lam: float) -> None:
    found = _advantages(preset="ppo", gae_gamma=gamma, gae_lambda=lam)
    expected = [
        plain_advantages.gae(REWARDS[i], [0.0] * LENGTHS[i], VALUES[i][where].tolist(), gamma, lam)
        for i, where in enumerate(MASK)
    ]
    _assert_tokens(found.advantages, expected)


def test_batch_std_without_a_kl_whitens_the_reward_over_trained_tokens() -> None:
    found = _advantages(preset="reinforce_plus_plus", kl={"beta": 0})
    _assert_tokens(found.advantages, plain_advantages.whiten(_repeated(REWARDS)))


@pytest.mark.parametrize("bound", [1e-6, 0.3, 0.8, 1.2, 50.0])
def test_a_bound_on_the_second_moment_makes_the_advantage_zero_where_its_equation_drops(bound: float) -> None:
    rollout = _matrix(3)
    out = resolve(ObjectiveConfig(preset="m2po", second_moment=bound)).advantages(
        torch.tensor(REWARDS, dtype=torch.float64),
        torch.tensor(PROMPTS),
        MASK,
        proximal_logprobs=PROXIMAL,
        rollout_logprobs=rollout,
    )
    stay = iter(plain_advantages.second_moment((PROXIMAL - rollout)[MASK].tolist(), bound))
    all_kept = _repeated(plain_advantages.group_std(REWARDS, PROMPTS))
    expected = [[a if next(stay) else 0.0 for a in row] for row in all_kept]
    _assert_tokens(out.advantages, expected)
    assert (expected == all_kept) == (bound == 50.0)
