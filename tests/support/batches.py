"""Batches for the tests of the objectives: random ones, hypothesis strategies; and the table's c_t, once more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pipeline.objectives import PRESETS, Composition, Denominators, LossInputs, ObjectiveConfig, resolve


def _loss_of(name: str) -> Composition:
    """A row's cells without those that are used before the loss."""
    cells = PRESETS[name].cells
    if cells.needs_critic or cells.kl_in_reward:
        return cells
    cells = replace(cells, std="population", std_epsilon=0.0, whiten=False, second_moment=None)
    return replace(cells, advantage="group_mean", dynamic_sampling=False, overlong_fraction=0.0)


DISTINCT = sorted({_loss_of(name): name for name in sorted(PRESETS, reverse=True)}.values())
"""One preset for each loss: RLOO's is REINFORCE's, and MaxRL's Dr.GRPO's. For what holds of a loss whatever A is."""
PER_TOKEN_ADVANTAGES = ("ppo", "reinforce_plus_plus", "gspo_token")


def make_batch(
    name: str,
    seed: int,
    sequences: int = 5,
    tokens: int = 7,
    staleness: float = 0.3,
    discrepancy: float = 0.1,
    dtype: torch.dtype = torch.float64,
    holes: bool = False,
) -> LossInputs:
    """A batch whose log(pi/pi_o) and log(pi_o/mu) have these standard deviations; the first sequence is empty.

    Sequences 2 k and 2 k + 1 are of one prompt. holes: untrained tokens stand between trained ones too, and nothing
    but nan stands there.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(1, tokens + 1, (sequences, 1), generator=generator)
    lengths[0] = 0
    mask = torch.arange(tokens) < lengths
    if holes:
        mask &= torch.rand(sequences, tokens, generator=generator) < 0.6
    rollout = -1 - normal(sequences, tokens).abs()
    proximal = rollout + discrepancy * normal(sequences, tokens)
    current = proximal + staleness * normal(sequences, tokens)
    values = normal(sequences, tokens)
    critic = resolve(ObjectiveConfig(preset=name)).needs_critic
    if holes:
        for matrix in (rollout, proximal, current, values):
            matrix[~mask] = torch.nan
    return LossInputs(
        current_logprobs=current.requires_grad_(),
        proximal_logprobs=proximal,
        rollout_logprobs=rollout,
        advantages=normal(sequences, tokens) if name in PER_TOKEN_ADVANTAGES else normal(sequences),
        mask=mask,
        values=(values + 0.3 * normal(sequences, tokens)).requires_grad_() if critic else None,
        proximal_values=values if critic else None,
        returns=normal(sequences, tokens) if critic else None,
        prompt_tokens=prompt_tokens(mask),
    )


def prompt_tokens(mask: Tensor) -> Tensor:
    """[S], trained tokens of the two sequences of each one's prompt."""
    prompt = torch.arange(len(mask)) // 2
    return torch.zeros(len(mask), dtype=torch.int64).index_add(0, prompt, mask.sum(-1))[prompt]


def whole(x: LossInputs, max_length: int = 9) -> Denominators:
    """The denominators of a batch of `make_batch`."""
    return Denominators.of(x.mask, max_length, prompts=(len(x.mask) + 1) // 2)


def batches(name: str) -> st.SearchStrategy[LossInputs]:
    """Batches of one preset: 1 to 6 sequences of 0 to 8 tokens, nearly on policy to far off it."""
    return st.builds(
        make_batch,
        name=st.just(name),
        seed=st.integers(0, 2**31),
        sequences=st.integers(1, 6),
        tokens=st.integers(1, 8),
        staleness=st.sampled_from([1e-4, 0.05, 0.3, 1.5]),
        discrepancy=st.sampled_from([0.0, 0.02, 0.5, 1.5]),
    )


def loss_and_gradients(
    name: str, inputs: LossInputs, denominators: Denominators, **cells: Any
) -> tuple[Tensor, list[Tensor]]:
    """Of a preset with some cells written over; the gradients by log pi, by values and by entropy where they are."""
    loss = resolve(ObjectiveConfig(preset=name, **cells)).loss(inputs, denominators).loss
    return loss.detach(), list(torch.autograd.grad(loss, leaves(inputs), allow_unused=False))


def leaves(inputs: LossInputs) -> list[Tensor]:
    """What a loss is differentiated by."""
    return [x for x in (inputs.current_logprobs, inputs.values, inputs.entropy) if x is not None and x.requires_grad]


def rows(inputs: LossInputs, index: Tensor | slice) -> LossInputs:
    """Some sequences of a batch, as leaves of their own."""
    chosen = {}
    for field, value in vars(inputs).items():
        if isinstance(value, Tensor):
            chosen[field] = value.detach()[index].requires_grad_(value.requires_grad)
    return replace(inputs, **chosen)


Potential = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(log r, log w, A [S, 1] or [S, T], mask as numbers, N) -> the function of log pi whose gradient is c_t, [S]."""


def _token(term: Callable[[Tensor, Tensor, Tensor], Tensor], per_length: bool) -> Potential:
    def potential(log_r: Tensor, log_w: Tensor, A: Tensor, mask: Tensor, N: Tensor) -> Tensor:
        total = (term(log_r, log_w, A) * mask).sum(-1)
        return total / N.clamp(min=1) if per_length else total

    return potential


def _sequence(low: float, high: float, times_length: bool) -> Potential:
    def potential(log_r: Tensor, log_w: Tensor, A: Tensor, mask: Tensor, N: Tensor) -> Tensor:
        s = ((log_r * mask).sum(-1) / N.clamp(min=1)).exp()
        term = torch.minimum(s * A[:, 0], s.clamp(1 - low, 1 + high) * A[:, 0])
        return term * N if times_length else term * (N > 0)

    return potential


def _clip(low: float, high: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda log_r, log_w, A: torch.minimum(log_r.exp() * A, log_r.exp().clamp(1 - low, 1 + high) * A)


def _bounded_above(log_x: Tensor, bound: float) -> Tensor:
    """The function whose derivative by log x is min(x, bound)."""
    edge = torch.tensor(bound, dtype=log_x.dtype).log()
    return torch.where(log_x < edge, log_x.exp(), bound * (1 + log_x - edge))


def _mini_rl(log_r: Tensor, log_w: Tensor, A: Tensor) -> Tensor:
    masked = ((A > 0) & (log_r.exp() > 1.27)) | ((A < 0) & (log_r.exp() < 0.8))
    return ~masked * _bounded_above(log_r + log_w, 5.0) * A


def _sapo(log_r: Tensor, log_w: Tensor, A: Tensor) -> Tensor:
    tau = torch.where(A > 0, torch.ones_like(A), torch.full_like(A, 1.05))
    return 4 / tau * torch.sigmoid(tau * (log_r.exp() - 1)) * A


def _gmpo(log_r: Tensor, log_w: Tensor, A: Tensor, mask: Tensor, N: Tensor) -> Tensor:
    kept = torch.where(A > 0, log_r.clamp(max=0.4), torch.where(A < 0, log_r.clamp(min=-0.4), log_r)) * mask
    return A[:, 0] * (kept.sum(-1) / N.clamp(min=1)).exp() * (N > 0)


def _areal_token(log_r: Tensor, log_w: Tensor, A: Tensor) -> Tensor:
    return _clip(0.4, 0.4)(log_r, log_w, A) * log_w.exp() * (log_w.exp() <= 5)


def _vespo(log_r: Tensor, log_w: Tensor, A: Tensor, mask: Tensor, N: Tensor) -> Tensor:
    """The integral of W^(k-1) e^(lambda (1 - W)) by W: k is 2 and 3."""
    W = ((log_r + log_w) * mask).sum(-1).exp()
    positive = -math.exp(3.0) * torch.exp(-3 * W) * (W / 3 + 1 / 9)
    otherwise = -math.exp(2.0) * torch.exp(-2 * W) * (W**2 / 2 + W / 2 + 1 / 4)
    return torch.where(A[:, 0] > 0, positive, otherwise) * A[:, 0] * (N > 0)


def _by_probability(name: str, x: LossInputs, A: Tensor) -> Tensor:
    """c_t of the rows that bound a token's probability."""
    p, q = x.current_logprobs.detach().exp(), x.rollout_logprobs.exp()
    rest = (1 - p).clamp(min=1e-12)  # random log-probs may be above 0
    distance = (
        q * (q / p).log() + (1 - q) * ((1 - q).clamp(min=1e-12) / rest).log() if name == "dppo_kl" else (p - q).abs()
    )
    far = distance > {"dppo_tv": 0.15, "dppo_kl": 0.05, "ipo": 0.1}[name]
    if name == "ipo":
        return ~far * p / q * A - 2e-3 * (p / q).log()
    return ~(far & ((p - q) * A > 0)) * (p / q).clamp(max=20.0) * A


def _mean_weight(log_w: Tensor, mask: Tensor, N: Tensor) -> Tensor:
    return (log_w.exp() * (log_w.exp() <= 5) * mask).sum(-1) / N.clamp(min=1)


POTENTIALS: dict[str, Potential] = {
    "reinforce": _token(lambda log_r, log_w, A: (log_r + log_w).exp() * A, per_length=False),
    "rloo": _token(lambda log_r, log_w, A: (log_r + log_w).exp() * A, per_length=False),
    "reinforce_plus_plus": _token(_clip(0.2, 0.2), per_length=False),
    "ppo": _token(_clip(0.2, 0.2), per_length=False),
    "grpo": _token(_clip(0.2, 0.2), per_length=True),
    "dr_grpo": _token(_clip(0.2, 0.2), per_length=False),
    "dapo": _token(_clip(0.2, 0.28), per_length=False),
    "gspo": _sequence(3e-4, 4e-4, times_length=False),
    "dr_gspo": _sequence(3e-4, 4e-4, times_length=True),
    "gmpo": _gmpo,
    "cispo": _token(lambda log_r, log_w, A: _bounded_above(log_r, 5.0) * A, per_length=False),
    "sapo": _token(_sapo, per_length=True),
    "minirl": _token(_mini_rl, per_length=False),
    "vespo": _vespo,
    "luspo": _sequence(2e-3, 2.5e-3, times_length=True),
    "icepop": _token(lambda log_r, log_w, A: (log_r + log_w).exp().clamp(0.5, 5.0) * A, per_length=False),
    "maxrl": _token(_clip(0.2, 0.2), per_length=False),
    "m2po": _token(lambda log_r, log_w, A: (log_r + log_w).exp() * A, per_length=False),
    "reinforce_baseline": _token(_clip(0.2, 0.2), per_length=False),
    "scalerl": _token(lambda log_r, log_w, A: _bounded_above(log_r + log_w, 5.0) * A, per_length=False),
    "areal_grpo": _token(_areal_token, per_length=False),
    "areal_dr_grpo": _token(_areal_token, per_length=False),
    "areal_gspo": lambda log_r, log_w, A, mask, N: (
        _sequence(0.4, 0.4, times_length=True)(log_r, log_w, A, mask, N) * _mean_weight(log_w, mask, N)
    ),
    "areal_sapo": _token(lambda log_r, log_w, A: _sapo(log_r + log_w, log_w, A), per_length=False),
}
"""By preset, a function of log pi whose derivative is c_t: the term itself, or where the term stops gradients, the
integral of its coefficient."""

BY_PROBABILITY = ("dppo_tv", "dppo_kl", "ipo")
"""Rows whose coefficient depends on a token's probability itself, and not on ratios alone."""
NO_POTENTIAL = ("gspo_token", *BY_PROBABILITY)
"""Slopes of the first at different tokens are not one function's; the others' functions would need more than ratios."""

EDGES: dict[str, tuple[float, ...]] = {
    "reinforce_plus_plus": (0.8, 1.2),
    "ppo": (0.8, 1.2),
    "grpo": (0.8, 1.2),
    "dr_grpo": (0.8, 1.2),
    "dapo": (0.8, 1.28),
    "gspo": (1 - 3e-4, 1 + 4e-4),
    "gspo_token": (1 - 3e-4, 1 + 4e-4),
    "dr_gspo": (1 - 3e-4, 1 + 4e-4),
    "gmpo": (0.6703200460356393, 1.4918246976412703),
    "cispo": (5.0,),
    "minirl": (0.8, 1.27),
    "luspo": (1 - 2e-3, 1 + 2.5e-3),
    "icepop": (0.5, 5.0),
    "maxrl": (0.8, 1.2),
    "reinforce_baseline": (0.8, 1.2),
    "scalerl": (5.0,),
    "areal_grpo": (0.6, 1.4),
    "areal_dr_grpo": (0.6, 1.4),
    "areal_gspo": (0.6, 1.4),
}
"""Values of the ratio at which a preset's gradient jumps."""

assert set(POTENTIALS) | set(NO_POTENTIAL) == set(PRESETS)


def table_coefficients(name: str, inputs: LossInputs) -> Tensor:
    """c_t [S, T] of every sequence by the table of objectives.md, from log-probs alone."""
    log_r = (inputs.current_logprobs - inputs.proximal_logprobs).detach()
    log_w = inputs.proximal_logprobs - inputs.rollout_logprobs
    A = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages[:, None]
    mask = inputs.mask.to(A)
    N = mask.sum(-1, keepdim=True)
    r, w, rho = log_r.exp(), log_w.exp(), (log_r + log_w).exp()
    s = ((log_r * mask).sum(-1, keepdim=True) / N.clamp(min=1)).exp()

    def inside(x: Tensor, low: float, high: float) -> Tensor:
        return ~(((A > 0) & (x > high)) | ((A < 0) & (x < low)))

    one_over_n = 1 / N.clamp(min=1)
    if name in ("reinforce", "rloo", "m2po"):
        c = rho * A
    elif name in BY_PROBABILITY:
        c = _by_probability(name, inputs, A)
    elif name == "vespo":
        W = ((log_r + log_w) * mask).sum(-1, keepdim=True).exp()
        c = torch.where(A > 0, (3 - 3 * W).exp() * W**2, (2 - 2 * W).exp() * W**3) * A
    elif name == "icepop":
        c = rho * (rho >= 0.5) * (rho <= 5) * A
    elif name == "scalerl":
        c = rho.clamp(max=5.0) * A
    elif name == "luspo":
        c = inside(s, 1 - 2e-3, 1 + 2.5e-3) * s * A
    elif name in ("ppo", "reinforce_plus_plus", "dr_grpo", "maxrl", "reinforce_baseline"):
        c = inside(r, 0.8, 1.2) * r * A
    elif name == "grpo":
        c = inside(r, 0.8, 1.2) * r * A * one_over_n
    elif name == "dapo":
        c = inside(r, 0.8, 1.28) * r * A
    elif name in ("gspo", "gspo_token"):
        c = inside(s, 1 - 3e-4, 1 + 4e-4) * s * A * one_over_n
    elif name == "dr_gspo":
        c = inside(s, 1 - 3e-4, 1 + 4e-4) * s * A
    elif name == "gmpo":
        kept = torch.where(A > 0, log_r.clamp(max=0.4), torch.where(A < 0, log_r.clamp(min=-0.4), log_r))
        clipped_s = ((kept * mask).sum(-1, keepdim=True) / N.clamp(min=1)).exp()
        c = (kept == log_r) * clipped_s * A * one_over_n
    elif name == "cispo":
        c = r.clamp(max=5.0) * A
    elif name == "sapo":
        tau = torch.where(A > 0, torch.ones_like(A), torch.full_like(A, 1.05))
        c = r * A * one_over_n / torch.cosh(tau * (r - 1) / 2) ** 2
    elif name == "minirl":
        c = inside(r, 0.8, 1.27) * rho.clamp(max=5.0) * A
    elif name in ("areal_grpo", "areal_dr_grpo"):
        c = inside(r, 0.6, 1.4) * r * w * (w <= 5) * A
    elif name == "areal_gspo":
        c = inside(s, 0.6, 1.4) * s * A * _mean_weight(log_w, mask, N[:, 0])[:, None]
    elif name == "areal_sapo":
        tau = torch.where(A > 0, torch.ones_like(A), torch.full_like(A, 1.05))
        c = rho * A / torch.cosh(tau * (rho - 1) / 2) ** 2
    else:
        raise KeyError(name)
    return c * mask
