"""T1 to T6, T9 and T10 of the theory, over every sequence of a small policy, in float64.

V = 3, at most 6 tokens, token 0 stops. mu is drawn at random; pi is mu moved by delta along a random direction.
t: the true ratio prod r_t;  g1 = 1 + sum delta_t (GRPO without 1/N);  s~ = 1 + N (s - 1) (Dr.GSPO);  delta_t = r_t - 1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline.objectives import CorrectionConfig, Denominators, LossInputs, ObjectiveConfig, resolve
from pipeline.objectives.terms.advantages import group_std
from pipeline.objectives.terms.corrections import correction_weight
from tests.support.enumeration import (
    coefficients,
    expected_gradient,
    gradient_of_mean,
    logprobs,
    probabilities,
    tree,
    weighted_variance,
)

ALL = tree(vocabulary=3, length=6)
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


BASE, DIRECTION, REWARDS = _normal(ALL.rows, 3), _normal(ALL.rows, 3), _normal(len(ALL.tokens))
MU = logprobs(BASE, ALL)
P = probabilities(MU)
N = ALL.lengths
UNCLIPPED = {"clip_low": 1.0, "clip_high": 1e9}
EXACT = {"preset": "reinforce", "correction": {"kind": "sequence_is", "numerator": "current"}}
GRPO_SUM = {"preset": "dr_grpo", "reduction": "sequence_mean_token_sum", **UNCLIPPED}
DR_GSPO = {"preset": "dr_gspo", **UNCLIPPED}


def _mean_gradient(config: dict, delta: float, rewards: Tensor, proximal: Tensor = MU) -> Tensor:
    """The mean over mu of an objective's gradient at pi = mu moved by delta."""
    logits = BASE + delta * DIRECTION
    current = logprobs(logits, ALL)
    c = coefficients(resolve(ObjectiveConfig(**config)), current, proximal, MU, rewards, ALL.mask)
    return expected_gradient(c, P, logits, ALL)


def _ratios(delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta_t [M, T], t, g1, s~ [M]."""
    log_r = logprobs(BASE + delta * DIRECTION, ALL) - MU
    deltas = log_r.expm1()
    return deltas, log_r.sum(-1).exp(), 1 + deltas.sum(-1), 1 + N * ((log_r.sum(-1) / N).exp() - 1)


def _slopes(errors: list[float]) -> list[float]:
    """log2 of successive quotients, for a delta that is halved each time."""
    return [math.log2(abs(a / b)) for a, b in pairwise(errors)]


def test_enumeration_is_complete() -> None:
    assert len(ALL.tokens) == sum(2 ** (n - 1) for n in range(1, 7)) + 2**6 == 127
    assert P.sum().item() == pytest.approx(1, abs=1e-14)


# T1


def test_t1_sequence_importance_sampling_has_the_gradient_of_the_expected_reward() -> None:
    logits = BASE + 0.5 * DIRECTION
    gradient = _mean_gradient(EXACT, 0.5, REWARDS)
    h = 1e-5
    for row in range(0, ALL.rows, 5):
        for token in range(3):
            step = torch.zeros_like(logits)
            step[row, token] = h
            up, down = ((probabilities(logprobs(logits + sign * step, ALL)) * REWARDS).sum() for sign in (1, -1))
            assert ((up - down) / (2 * h)).item() == pytest.approx(gradient[row, token].item(), abs=1e-9)
    torch.testing.assert_close(gradient, gradient_of_mean(REWARDS, logits, ALL), rtol=0, atol=1e-15)


# T2


def _objective_change(config: dict, delta: float) -> float:
    """J_surrogate(delta) - J_surrogate(0), its mean over mu; A scaled by a probability scales the term."""
    objective = resolve(ObjectiveConfig(**config))

    def value(d: float) -> Tensor:
        current = logprobs(BASE + d * DIRECTION, ALL)
        return -objective.loss(LossInputs(current, MU, MU, P * REWARDS, ALL.mask), Denominators(1, 1, 1)).loss

    return (value(delta) - value(0.0)).item()


@pytest.mark.parametrize(
    ("config", "second_order"),
    [
        # t - g1 = sum_{i<j} delta_i delta_j;  t - s~ = (1/2)(1 - 1/N)(sum delta)^2, to second order
        (GRPO_SUM, lambda d: 0.5 * (d.sum(-1).square() - d.square().sum(-1))),
        (DR_GSPO, lambda d: 0.5 * (1 - 1 / N) * d.sum(-1).square()),
    ],
    ids=["grpo-sum", "dr-gspo"],
)
def test_t2_objective_error_is_second_order_and_gradient_error_first(config: dict, second_order) -> None:
    deltas = [0.02, 0.01, 0.005, 0.0025]
    objective_errors, gradient_errors = [], []
    for delta in deltas:
        logits = BASE + delta * DIRECTION
        true_change = ((probabilities(logprobs(logits, ALL)) - P) * REWARDS).sum().item()
        objective_errors.append(true_change - _objective_change(config, delta))
        gradient_errors.append((gradient_of_mean(REWARDS, logits, ALL) - _mean_gradient(config, delta, REWARDS)).norm())
    assert _slopes(objective_errors)[-1] == pytest.approx(2, abs=0.01)
    assert _slopes(gradient_errors)[-1] == pytest.approx(1, abs=0.01)
    tiny = 1e-5
    first = _ratios(tiny)[0] / tiny
    leading = (P * REWARDS * second_order(first)).sum().item()
    assert objective_errors[-1] / deltas[-1] ** 2 == pytest.approx(leading, rel=0.02)


# T3


def test_t3_delta_has_mean_zero_under_every_prefix_and_its_log_has_mean_minus_kl() -> None:
    mu, pi = BASE.softmax(-1), (BASE + 0.3 * DIRECTION).softmax(-1)
    delta = pi / mu - 1
    assert (mu * delta).sum(-1).abs().max() < 1e-15
    kl = (mu * (mu / pi).log()).sum(-1)
    torch.testing.assert_close((mu * delta.log1p()).sum(-1), -kl, rtol=1e-12, atol=1e-16)
    assert kl.min() > 0


def test_t3_g1_and_the_true_ratio_have_the_same_mean() -> None:
    _, t, g1, geometric = _ratios(0.3)
    assert (P * t).sum().item() == pytest.approx(1, abs=1e-14)
    assert (P * (g1 - t)).sum().abs() < 1e-14
    assert (P * (geometric - t)).sum() < -1e-2  # the geometric one is biased


def test_t3_identity_3_and_what_the_tutorial_leaves_out() -> None:
    remainders, omitted = [], []
    for delta in (0.02, 0.01, 0.005):
        d, t, _, geometric = _ratios(delta)
        squared = d.sum(-1).square()
        remainders.append((t - geometric - 0.5 * (1 - 1 / N) * squared).abs().max().item())
        # the tutorial: sum_{i<j} delta_i delta_j + (1/2) sum delta^2, which is (1/2)(sum delta)^2
        pairs = 0.5 * (squared - d.square().sum(-1))
        left = t - geometric - (pairs + 0.5 * d.square().sum(-1))
        omitted.append(((left + squared / (2 * N)).abs().max() / left.abs().max()).item())
    assert _slopes(remainders)[-1] == pytest.approx(3, abs=0.05)
    assert omitted[-1] < 0.05  # what is left over is -(sum delta)^2 / (2 N), to second order


# T4


def _variances(mu: Tensor, pi: Tensor, length: int) -> tuple[float, float, float]:
    """Var of t, g1 and s~ for `length` tokens drawn alike: exact, from moments of one token."""
    ratio = pi / mu

    def moment(power: float) -> Tensor:
        return (mu * ratio**power).sum()

    product = moment(2) ** length - 1
    total = length * (moment(2) - 1)
    geometric = length**2 * (moment(2 / length) ** length - moment(1 / length) ** (2 * length))
    return product.item(), total.item(), geometric.item()


MU_TOKEN = torch.tensor([0.05, 0.45, 0.5], dtype=torch.float64)
RARE_TOKEN_GAINS = torch.tensor([0.08, 0.44, 0.48], dtype=torch.float64)
RARE_TOKEN_LOSES = 2 * MU_TOKEN - RARE_TOKEN_GAINS
"""delta of the opposite sign: the same sigma^2, the opposite skew."""


def test_t4_the_closed_forms_are_the_enumerated_variances() -> None:
    fixed = tree(vocabulary=3, length=6, stop=False)
    for pi in (RARE_TOKEN_GAINS, RARE_TOKEN_LOSES):
        mu_all = logprobs(MU_TOKEN.log().expand(fixed.rows, 3), fixed)
        log_r = logprobs(pi.log().expand(fixed.rows, 3), fixed) - mu_all
        values = (log_r.sum(-1).exp(), 1 + log_r.expm1().sum(-1), 1 + 6 * ((log_r.sum(-1) / 6).exp() - 1))
        enumerated = [weighted_variance(value, probabilities(mu_all)).item() for value in values]
        assert enumerated == pytest.approx(_variances(MU_TOKEN, pi, 6), rel=1e-11)


def test_t4_variance_of_the_product_is_exponential_and_of_the_sum_linear_in_length() -> None:
    sigma2 = (RARE_TOKEN_GAINS**2 / MU_TOKEN).sum().item() - 1
    for length in (1, 6, 64, 1024):
        product, total, _ = _variances(MU_TOKEN, RARE_TOKEN_GAINS, length)
        assert product == pytest.approx((1 + sigma2) ** length - 1, rel=1e-9)
        assert total == pytest.approx(length * sigma2, rel=1e-12)


def test_t4_the_geometric_mean_has_less_variance_only_where_delta_is_skewed_to_the_right() -> None:
    for length in (6, 64, 1024):
        _, total, geometric = _variances(MU_TOKEN, RARE_TOKEN_GAINS, length)
        _, same_total, larger = _variances(MU_TOKEN, RARE_TOKEN_LOSES, length)
        assert same_total == pytest.approx(total, rel=1e-12)
        assert geometric < 0.7 * total
        assert larger > 1.9 * total


def test_t4_the_difference_is_minus_the_third_moment_to_lowest_order() -> None:
    """Var(s~) = N sigma^2 - (N - 1) E[delta^3] + O(delta^4)."""
    delta, scale = RARE_TOKEN_GAINS / MU_TOKEN - 1, 3e-3
    third = (MU_TOKEN * (scale * delta) ** 3).sum().item()
    for length in (2, 6, 64):
        differences = []
        for sign in (1, -1):
            _, total, geometric = _variances(MU_TOKEN, MU_TOKEN * (1 + sign * scale * delta), length)
            differences.append(geometric - total)
        odd_part = (differences[0] - differences[1]) / 2  # the fourth order is even in delta
        assert odd_part / (-(length - 1) * third) == pytest.approx(1, abs=0.01)


def test_t4_a_sampled_token_that_pi_thinks_impossible_costs_the_geometric_mean_most() -> None:
    pi = torch.tensor([0.001, 0.474, 0.525], dtype=torch.float64)
    _, total, geometric = _variances(MU_TOKEN, pi, 64)
    assert geometric > 10 * total


def test_t4_gaussian_logit_noise_goes_both_ways_and_a_large_vocabulary_favours_the_geometric_mean() -> None:
    """The share of draws in which the geometric mean has more variance: about half at V = 3, few at V = 256."""
    generator = torch.Generator().manual_seed(1)

    def share(vocabulary: int, noise: float, draws: int = 300) -> float:
        worse = 0
        for _ in range(draws):
            logits = 1.5 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
            moved = logits + noise * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
            _, total, geometric = _variances(logits.softmax(0), moved.softmax(0), 64)
            worse += geometric > total
        return worse / draws

    assert 0.4 < share(3, 0.2) < 0.6
    assert share(256, 0.5) < 0.1


# T5


@pytest.mark.parametrize("baseline", [0.0, 1.0, -3.0])
def test_t5_dividing_by_length_on_policy_is_the_gradient_of_reward_per_token(baseline: float) -> None:
    gradient = _mean_gradient({"preset": "grpo", **UNCLIPPED}, 0.0, REWARDS - baseline)
    torch.testing.assert_close(gradient, gradient_of_mean((REWARDS - baseline) / N, BASE, ALL), rtol=0, atol=1e-15)


def test_t5_the_baseline_is_free_without_1_over_n_and_not_with_it() -> None:
    ones = torch.ones_like(REWARDS)
    assert _mean_gradient({"preset": "dr_grpo", **UNCLIPPED}, 0.0, ones).norm() < 1e-15
    free = _mean_gradient({"preset": "grpo", **UNCLIPPED}, 0.0, ones)
    torch.testing.assert_close(free, gradient_of_mean(1 / N, BASE, ALL), rtol=0, atol=1e-15)
    assert free.norm() > 0.05


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "gmpo"])
def test_t5_with_1_over_n_right_answers_get_shorter_and_wrong_ones_longer(name: str) -> None:
    """A > 0 everywhere: the mean length falls along the gradient; A < 0: it grows, at the same rate."""
    longer = gradient_of_mean(N, BASE, ALL)
    right = (_mean_gradient({"preset": name}, 0.0, torch.ones_like(N)) * longer).sum().item()
    wrong = (_mean_gradient({"preset": name}, 0.0, -torch.ones_like(N)) * longer).sum().item()
    assert right < -0.01
    assert wrong == pytest.approx(-right, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["reinforce", "dr_grpo", "dapo", "dr_gspo", "cispo", "minirl", "areal_grpo", "areal_gspo"]
)
def test_t5_without_1_over_n_an_equal_advantage_moves_nothing(name: str) -> None:
    assert _mean_gradient({"preset": name}, 0.0, torch.ones_like(N)).norm() < 1e-15


# T6


def _weight_of_prompt(p: float, group: int) -> float:
    """c_G(p) = E_k sqrt(k (G - k)) / (G p (1 - p)), k ~ Bin(G, p)."""
    mean = sum(
        math.comb(group, k) * p**k * (1 - p) ** (group - k) * math.sqrt(k * (group - k)) for k in range(group + 1)
    )
    return mean / (group * p * (1 - p))


def _direction(rewards: Tensor, p: float) -> Tensor:
    """What multiplies grad p in (1/G) sum_i A_i score_i, the mean scores of right and wrong answers put in. [groups]"""
    ids = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    informative = (rewards != rewards[:, :1]).any(1, keepdim=True)  # 0/0 where all rewards of a group are equal
    advantages = torch.where(informative, group_std(rewards.flatten(), ids, epsilon=0.0).view_as(rewards), 0.0)
    return (advantages * torch.where(rewards > 0, 1 / p, -1 / (1 - p))).mean(-1)


@pytest.mark.parametrize(("p", "expected"), [(0.05, 2.47), (0.5, 1.86)])
def test_t6_the_numbers_of_the_closed_form(p: float, expected: float) -> None:
    assert _weight_of_prompt(p, 8) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("group", [2, 8])
def test_t6_the_std_multiplies_a_prompts_gradient_by_c_g(p: float, group: int) -> None:
    k = torch.arange(group + 1)
    rewards = (torch.arange(group)[None] < k[:, None]).double()
    binomial = torch.tensor([math.comb(group, int(i)) * p ** int(i) * (1 - p) ** (group - int(i)) for i in k]).double()
    exact = (binomial * _direction(rewards, p)).sum().item()
    assert exact == pytest.approx(_weight_of_prompt(p, group), rel=1e-6)
    drawn = _direction((torch.rand(40_000, group, generator=_generator, dtype=torch.float64) < p).double(), p)
    error = drawn.std().item() / math.sqrt(len(drawn))
    assert drawn.mean().item() == pytest.approx(_weight_of_prompt(p, group), abs=4 * error)


def test_t6_however_hard_the_prompt_the_weight_stays_below_sqrt_of_g_minus_1() -> None:
    """1/sqrt(p(1-p)), the weight by the true std, is 100 at p = 1e-4; a group of 8 gives 2.6."""
    for group in (2, 8, 64):
        assert _weight_of_prompt(1e-6, group) == pytest.approx(math.sqrt(group - 1), rel=1e-3)
        assert _weight_of_prompt(0.01, group) < math.sqrt(group - 1) + 1e-12


# T9


def test_t9_what_a_constant_reward_still_teaches() -> None:
    """||E_mu[b score]|| with b = 1 and pi = mu moved by 0.3: zero where the weight is a true ratio."""
    ones = torch.ones_like(REWARDS)

    def size(config: dict, proximal: Tensor = MU) -> float:
        return _mean_gradient(config, 0.3, ones, proximal).norm().item()

    current = logprobs(BASE + 0.3 * DIRECTION, ALL)
    truncated = {"preset": "reinforce", "correction": {"kind": "token_tis", "high": 1.2, "numerator": "current"}}
    assert size(EXACT) < 1e-15
    assert size({"preset": "reinforce"}) < 1e-15
    assert size(GRPO_SUM) < 1e-15
    assert size(truncated) == pytest.approx(0.01694, abs=1e-5)
    assert size(DR_GSPO) == pytest.approx(0.07410, abs=1e-5)
    assert size({"preset": "reinforce", "correction": []}, proximal=current) == pytest.approx(0.10467, abs=1e-5)
    assert size({"preset": "grpo", **UNCLIPPED}) == pytest.approx(0.08219, abs=1e-5)


def test_t9_only_dividing_by_length_still_teaches_on_policy() -> None:
    """As delta goes to 0 no importance sampling and Dr.GSPO go to 0 with it; GRPO goes to ||grad E[1/N]||."""
    ones = torch.ones_like(REWARDS)

    def size(config: dict, delta: float) -> float:
        return _mean_gradient(config, delta, ones).norm().item()

    assert _slopes([size(DR_GSPO, delta) for delta in (0.02, 0.01, 0.005)])[-1] == pytest.approx(1, abs=0.02)
    per_token = gradient_of_mean(1 / N, BASE, ALL).norm().item()
    assert size({"preset": "grpo", **UNCLIPPED}, 1e-6) == pytest.approx(per_token, rel=1e-4)


# T10


def _top_p(logits: Tensor, share: float) -> Tensor:
    """Bool, the smallest set of tokens that holds at least this share, per row."""
    probability, order = logits.softmax(-1).sort(-1, descending=True)
    kept = probability.cumsum(-1) - probability < share
    return torch.zeros_like(kept).scatter(-1, order, kept)


def test_t10_without_the_sampling_mask_the_mean_ratio_is_the_kept_mass_and_with_it_one() -> None:
    kept = _top_p(BASE, 0.8)
    sampler = torch.where(kept, BASE, -torch.inf)
    mass = (BASE.softmax(-1) * kept).sum(-1)
    assert mass.min() < 0.9
    behaviour = logprobs(sampler, ALL)
    sampled = probabilities(behaviour) > 0
    weights = probabilities(behaviour)[sampled]
    mask = ALL.mask[sampled]

    def mean_weight(trainer_logits: Tensor, kind: str) -> Tensor:
        """E of the correction's weight: per sequence, or of its first token's."""
        log_ratio = torch.where(mask, logprobs(trainer_logits, ALL)[sampled] - behaviour[sampled], 0.0)
        weight, _ = correction_weight(CorrectionConfig(kind=kind), log_ratio, mask.double(), torch.ones(len(mask), 1))
        return (weights * weight[:, 0]).sum()

    per_sequence = torch.where(ALL.mask, mass[ALL.prefixes], 1.0).prod(-1)[sampled]
    assert mean_weight(BASE, "token_is").item() == pytest.approx(mass[0].item(), abs=1e-14)
    assert mean_weight(BASE, "sequence_is").item() == pytest.approx((weights * per_sequence).sum().item(), abs=1e-14)
    moved = BASE + 0.3 * DIRECTION
    replayed = torch.where(kept, moved, -torch.inf)
    assert mean_weight(replayed, "token_is").item() == pytest.approx(1, abs=1e-14)
    assert mean_weight(replayed, "sequence_is").item() == pytest.approx(1, abs=1e-14)
    assert mean_weight(moved, "sequence_is").item() < 0.9


def test_t10_with_the_sampling_mask_the_gradient_is_that_of_the_truncated_policy() -> None:
    kept = _top_p(BASE, 0.8)
    behaviour = logprobs(torch.where(kept, BASE, -torch.inf), ALL)
    sampled = probabilities(behaviour) > 0
    weights = probabilities(behaviour)[sampled]
    logits = (BASE + 0.3 * DIRECTION).requires_grad_()
    replayed = logprobs(torch.where(kept, logits, -torch.inf), ALL)[sampled]
    mask, rewards = ALL.mask[sampled], REWARDS[sampled]

    def gradient(current: Tensor, rollout: Tensor) -> Tensor:
        x = LossInputs(current, current.detach(), rollout, weights * rewards, mask)
        loss = resolve(ObjectiveConfig(**EXACT)).loss(x, Denominators(1, 1, 1)).loss
        return -torch.autograd.grad(loss, logits, retain_graph=True)[0]

    truth = torch.autograd.grad((replayed.sum(-1).exp() * rewards).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient(replayed, behaviour[sampled]), truth, rtol=0, atol=1e-14)
    # Scored by the whole softmax on both sides the ratio's mean is near 1 and the gradient is still wrong.
    whole = logprobs(logits, ALL)[sampled]
    wrong = gradient(whole, MU[sampled])
    assert (wrong - truth).norm() > 0.1 * truth.norm()
