"""Every row, correction, KL and reduction once more, from the equations alone; advantages: `plain_advantages.py`.

One answer at a time, float64, only its trained tokens: no padding, no mask, no batch matrix, and no code of
`pipeline.objectives`. Papers and notation are those of docs/objectives.md. The tests hold the objectives against this
file, and fail when something is added there that has no equation here.

J is maximised; a loss is -J. `sg` holds a value constant. Gradients are autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """The trained tokens of one response. pi, old, mu: [N], log-probs. A: a number or [N]. The rest [N] where read.

    prompt_tokens: trained tokens of all answers of its prompt.
    """

    pi: Tensor
    old: Tensor
    mu: Tensor
    A: Tensor
    reference: Tensor | None = None
    entropy: Tensor | None = None
    V: Tensor | None = None
    V_old: Tensor | None = None
    R: Tensor | None = None
    prompt_tokens: int = 0

    @property
    def N(self) -> int:  # noqa: N802, as the equations write it
        return len(self.pi)


@dataclass(frozen=True)
class Sizes:
    """Of the mini-batch: answers, their trained tokens, prompts, and the longest response that may be."""

    answers: int
    tokens: int
    prompts: int
    longest: int


def sg(x: Tensor) -> Tensor:
    return x.detach()


def r(y: Answer) -> Tensor:
    return torch.exp(y.pi - y.old)


def w(y: Answer) -> Tensor:
    return sg(torch.exp(y.old - y.mu))


def rho(y: Answer) -> Tensor:
    return torch.exp(y.pi - y.mu)


def s(y: Answer) -> Tensor:
    return torch.exp((y.pi - y.old).mean())


# Terms, [N]. A term of a whole answer stands at each of its tokens.


def _each(y: Answer, term: Tensor) -> Tensor:
    return term.expand(y.N)


def _min_clip(x: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(x * A, torch.clamp(x, 1 - low, 1 + high) * A)


def _policy_gradient(y: Answer) -> Tensor:
    return sg(rho(y)) * y.A * y.pi


def _clip(low: float, high: float) -> Callable[[Answer], Tensor]:
    return lambda y: _min_clip(r(y), y.A, low, high)


def _clip_sequence(low: float, high: float) -> Callable[[Answer], Tensor]:
    return lambda y: _each(y, _min_clip(s(y), y.A, low, high))


def _gspo_token(y: Answer) -> Tensor:
    s_t = sg(s(y)) * torch.exp(y.pi - sg(y.pi))
    return _min_clip(s_t, y.A, 3e-4, 4e-4)


def _gmpo(y: Answer) -> Tensor:
    """(prod_t |min(r_t A, clip(r_t, e^-.4, e^.4) A)|)^(1/N) sgn(A), as its paper writes it."""
    if y.A == 0:
        return _each(y, 0 * y.pi.sum())
    kept = _min_clip_log(r(y), y.A)
    return _each(y, torch.sign(y.A) * kept.abs().prod() ** (1 / y.N))


def _min_clip_log(x: Tensor, A: Tensor) -> Tensor:
    return torch.minimum(x * A, torch.clamp(x, math.exp(-0.4), math.exp(0.4)) * A)


def _cispo(y: Answer) -> Tensor:
    return sg(torch.clamp(r(y), max=5.0)) * y.A * y.pi


def _sapo(x: Tensor, A: Tensor) -> Tensor:
    tau = 1.0 if A > 0 else 1.05
    return 4 / tau / (1 + torch.exp(-tau * (x - 1))) * A


def _minirl(y: Answer) -> Tensor:
    kept = torch.ones_like(y.pi)
    for t in range(y.N):
        ratio = float(sg(r(y))[t])
        if (y.A > 0 and ratio > 1.27) or (y.A < 0 and ratio < 0.8):
            kept[t] = 0.0
    return kept * sg(torch.clamp(rho(y), max=5.0)) * y.A * y.pi


def _areal_token(y: Answer) -> Tensor:
    return w(y) * (w(y) <= 5) * _min_clip(r(y), y.A, 0.4, 0.4)


def _areal_gspo(y: Answer) -> Tensor:
    return _each(y, (w(y) * (w(y) <= 5)).mean() * _min_clip(s(y), y.A, 0.4, 0.4))


def _dppo(
    distance: Callable[[float, float], float],
    down: float,
    up: float,
    both: bool,
    largest: float,
    other: Callable[[Answer], Tensor] = lambda y: y.mu,
) -> Any:
    """Token by token, with Python's numbers: dropped, or min(pi/q, largest) A log pi. down, up: the most that p may be
    from q below and above it."""

    def term(y: Answer) -> Tensor:
        A = y.A.expand(y.N) if y.A.dim() == 0 else y.A
        out = []
        for t in range(y.N):
            p, q, a = math.exp(float(sg(y.pi)[t])), math.exp(float(other(y)[t])), float(A[t])
            pushed = both or (a > 0 and p > q) or (a < 0 and p < q)
            dropped = pushed and distance(p, q) > (up if p > q else down)
            out.append(0.0 if dropped else min(p / q, largest))
        return torch.tensor(out, dtype=torch.float64) * A * y.pi

    return term


def _tv(p: float, q: float) -> float:
    return abs(p - q)


def _binary_kl(p: float, q: float) -> float:
    if p >= 1 or q >= 1:
        return 0.0 if p == q else math.inf
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def _vespo(y: Answer) -> Tensor:
    return _vespo_of(rho(y), y)


def _vespo_of(ratios: Tensor, y: Answer) -> Tensor:
    W = sg(ratios).prod()
    k, decay = (2.0, 3.0) if y.A > 0 else (3.0, 2.0)
    return math.exp(decay) * W**k * torch.exp(-decay * W) * y.A * y.pi


def _icepop(y: Answer) -> Tensor:
    weight = sg(rho(y))
    return weight * ((weight >= 0.5) & (weight <= 5)) * y.A * y.pi


# Reductions of a term [N], the answer's share. Under sequence_mean an answer counts as one number: what stands at each
# of its tokens, or of a KL or an entropy, which differ by token, their mean.

REDUCTIONS: dict[str, Callable[[Tensor, Answer, Sizes], Tensor]] = {
    "sequence_mean_token_mean": lambda x, y, b: x.sum() / y.N / b.answers,
    "sequence_mean_token_sum": lambda x, y, b: x.sum() / b.answers,
    "prompt_token_mean": lambda x, y, b: x.sum() / y.prompt_tokens / b.prompts,
    "token_mean": lambda x, y, b: x.sum() / b.tokens,
    "token_sum_constant": lambda x, y, b: x.sum() / (b.answers * b.longest),
    "sequence_mean": lambda x, y, b: x.mean() / b.answers,
}

ROWS: dict[str, tuple[Callable[[Answer], Tensor], str]] = {
    "reinforce": (_policy_gradient, "sequence_mean_token_sum"),
    "rloo": (_policy_gradient, "sequence_mean_token_sum"),
    "reinforce_plus_plus": (_clip(0.2, 0.2), "token_mean"),
    "ppo": (_clip(0.2, 0.2), "token_mean"),
    "grpo": (_clip(0.2, 0.2), "sequence_mean_token_mean"),
    "dr_grpo": (_clip(0.2, 0.2), "token_sum_constant"),
    "dapo": (_clip(0.2, 0.28), "prompt_token_mean"),
    "gspo": (_clip_sequence(3e-4, 4e-4), "sequence_mean"),
    "gspo_token": (_gspo_token, "sequence_mean_token_mean"),
    "dr_gspo": (_clip_sequence(3e-4, 4e-4), "sequence_mean_token_sum"),
    "gmpo": (_gmpo, "sequence_mean"),
    "cispo": (_cispo, "prompt_token_mean"),
    "sapo": (lambda y: _sapo(r(y), y.A), "sequence_mean_token_mean"),
    "minirl": (_minirl, "sequence_mean_token_sum"),
    "dppo_tv": (_dppo(_tv, 0.15, 0.15, False, 20.0), "token_sum_constant"),
    "dppo_kl": (_dppo(_binary_kl, 0.05, 0.05, False, 20.0), "token_sum_constant"),
    "ipo": (_dppo(_tv, 0.1, 0.1, True, math.inf), "token_mean"),
    "vespo": (_vespo, "token_mean"),
    "luspo": (_clip_sequence(2e-3, 2.5e-3), "sequence_mean_token_sum"),
    "icepop": (_icepop, "token_mean"),
    "maxrl": (_clip(0.2, 0.2), "token_sum_constant"),
    "m2po": (_policy_gradient, "prompt_token_mean"),
    "reinforce_baseline": (_clip(0.2, 0.2), "token_mean"),
    "scalerl": (lambda y: sg(torch.clamp(rho(y), max=5.0)) * y.A * y.pi, "prompt_token_mean"),
    "areal_grpo": (_areal_token, "token_mean"),
    "areal_dr_grpo": (_areal_token, "token_mean"),
    "areal_gspo": (_areal_gspo, "token_mean"),
    "areal_sapo": (lambda y: _sapo(rho(y), y.A), "token_mean"),
}
"""By preset: the term, and how it is reduced."""


def _dual_clip(y: Answer) -> Tensor:
    term = _min_clip(r(y), y.A, 0.2, 0.2)
    return torch.maximum(term, 1.3 * y.A) if y.A < 0 else term


WRITTEN_OVER: dict[str, tuple[str, dict[str, Any], Callable[[Answer], Tensor]]] = {
    "dual clip": ("grpo", {"surrogate": "dual_clip", "dual_clip": 1.3}, _dual_clip),
    "a clip on pi/mu": ("grpo", {"ratio_to": "rollout"}, lambda y: _min_clip(rho(y), y.A, 0.2, 0.2)),
    "a clip of s on pi/mu": (
        "gspo",
        {"ratio_to": "rollout", "clip_low": 0.1, "clip_high": 0.2},
        lambda y: _each(y, _min_clip(torch.exp((y.pi - y.mu).mean()), y.A, 0.1, 0.2)),
    ),
    "CISPO with both bounds": (
        "cispo",
        {"clip_low": 0.2, "clip_high": 0.3},
        lambda y: sg(torch.clamp(r(y), 0.8, 1.3)) * y.A * y.pi,
    ),
    "DPPO with a bound for each side": (
        "dppo_tv",
        {"trust_low": 0.02, "trust_high": 0.05, "trust_weight": 1.2},
        _dppo(_tv, 0.02, 0.05, False, 1.2),
    ),
    "DPPO on pi/pi_o": (
        "dppo_kl",
        {"ratio_to": "proximal"},
        _dppo(_binary_kl, 0.05, 0.05, False, 20.0, lambda y: y.old),
    ),
    "VESPO on pi/pi_o": ("vespo", {"ratio_to": "proximal"}, lambda y: _vespo_of(r(y), y)),
}
"""What no row has: the row, the cells that are written over, and the term then; advantages are numbers of answers."""


def _inside(weight: Tensor, low: float | None, high: float | None) -> Tensor:
    return weight * float((low is None or weight >= low) and (high is None or weight <= high))


def _per_token(f: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    return torch.stack([f(weight) for weight in weights])


def rejection(by: str, over: str, x: Tensor, low: float | None, high: float | None) -> Tensor:
    """1 where the statistic is inside, [N] for over token, else a number; x: the ratios."""
    k = {"k1": -x.log(), "k2": x.log() ** 2 / 2, "k3": x - 1 - x.log()}[by]

    def inside(v: Tensor) -> Tensor:
        return torch.tensor(float((low is None or v >= low) and (high is None or v <= high)), dtype=torch.float64)

    if over == "token":
        return torch.stack([inside(v) for v in k])
    return inside({"sum": k.sum(), "mean": k.mean(), "max": k.max()}[over])


CORRECTIONS: dict[str, Callable[[Tensor, Tensor, float | None, float | None], Tensor]] = {
    "token_is": lambda x, A, low, high: x,
    "token_tis": lambda x, A, low, high: _per_token(lambda v: v.clamp(max=high), x),
    "token_mis": lambda x, A, low, high: _per_token(lambda v: _inside(v, low, high), x),
    "icepop": lambda x, A, low, high: _per_token(lambda v: _inside(v, low, high), x),
    "mean_mis": lambda x, A, low, high: _per_token(lambda v: _inside(v, low, high), x).mean(),
    "sequence_is": lambda x, A, low, high: x.prod(),
    "sequence_tis": lambda x, A, low, high: x.prod().clamp(max=high),
    "sequence_mis": lambda x, A, low, high: _inside(x.prod(), low, high),
    "geometric_is": lambda x, A, low, high: x.prod() ** (1 / len(x)),
    "geometric_tis": lambda x, A, low, high: (x.prod() ** (1 / len(x))).clamp(max=high),
    "geometric_mask": lambda x, A, low, high: (_inside(x.prod() ** (1 / len(x)), low, high) > 0).double(),
    "reject": lambda x, A, low, high: rejection("k3", "mean", x, low, high),
    "opsm": lambda x, A, low, high: 1.0 - ((A < 0) & (-x.log().mean() > (high or 0.0))).double(),
}
"""(x = pi_o/mu or pi/mu, [N]; A; low; high) -> the factor, [N] or a number."""

DEFAULT_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "token_is": (None, None),
    "token_tis": (None, 2.0),
    "token_mis": (None, 2.0),
    "icepop": (0.5, 5.0),
    "mean_mis": (None, 5.0),
    "sequence_is": (None, None),
    "sequence_tis": (None, 2.0),
    "sequence_mis": (None, 2.0),
    "geometric_is": (None, None),
    "geometric_tis": (None, 2.0),
    "geometric_mask": (0.99, 1.01),
    "opsm": (None, 0.01),
    "reject": (None, 0.01),
}


def _l(y: Answer) -> Tensor:
    assert y.reference is not None
    return y.reference - y.pi


KLS: dict[str, Callable[[Answer], Tensor]] = {
    "k1": lambda y: -_l(y),
    "k2": lambda y: _l(y) ** 2 / 2,
    "k3": lambda y: torch.exp(_l(y)) - 1 - _l(y),
    "unbiased_k3": lambda y: rho(y) * (torch.exp(_l(y)) - 1 - _l(y)),
}
"""The estimate at each token of an answer."""


def _critic(y: Answer) -> Tensor:
    """1/2 max((V - R)^2, (V_old + clip(V - V_old, +-.2) - R)^2)."""
    assert y.V is not None
    assert y.V_old is not None
    assert y.R is not None
    clipped = y.V_old + torch.clamp(y.V - y.V_old, -0.2, 0.2)
    return torch.maximum((y.V - y.R) ** 2, (clipped - y.R) ** 2) / 2


def loss(
    name: str,
    answers: list[Answer],
    sizes: Sizes,
    *,
    corrections: tuple[tuple[str, str], ...] = (),
    term: Callable[[Answer], Tensor] | None = None,
    reduction: str | None = None,
    factor: Callable[[Answer], Tensor] | None = None,
    kl: tuple[str, float] | None = None,
    entropy: float = 0.0,
) -> Tensor:
    """-J of a row. Answers without tokens have no term; `sizes` counts them.

    corrections: (kind, "proximal" or "current"), beside the row's own. term: in place of the row's. factor: one more,
    of an answer.
    kl: (estimator, beta) in the loss.
    """
    rows, own = ROWS[name]
    reduced = REDUCTIONS[reduction or own]
    total = torch.zeros((), dtype=torch.float64)
    for y in answers:
        if y.N == 0:
            continue
        x = (term or rows)(y)
        for kind, numerator in corrections:
            weight = sg(torch.exp((y.old if numerator == "proximal" else y.pi) - y.mu))
            x = CORRECTIONS[kind](weight, y.A, *DEFAULT_BOUNDS[kind]) * x
        if factor is not None:
            x = factor(y) * x
        total = total - reduced(x, y, sizes)
        if name == "ipo" and kl is None:
            total = total + 1e-3 * reduced((y.pi - y.mu) ** 2, y, sizes)
        if kl is not None:
            total = total + kl[1] * reduced(KLS[kl[0]](y), y, sizes)
        if entropy:
            assert y.entropy is not None
            total = total - entropy * reduced(y.entropy, y, sizes)
        if name == "ppo":
            total = total + 0.5 * reduced(_critic(y), y, sizes)
    return total
