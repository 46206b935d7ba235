"""The parts that a gap is taken apart into, and for each the settings in which it alone is exchanged.

The order is from the most particular to the most general: where two exchanges close the gap alike, the first names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, get_args

from megatron_ext.config import Head
from megatron_ext.exchange import exchangeable_rope_theta
from pipeline.diagnose.bench import Bench, Setting

TEMPERATURES = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)  # times the configured one
EQUAL = 1e-6  # nats; float32 rounds as much
ROPE_THETAS = (1e3, 1e4, 1e5, 5e5, 1e6, 5e6, 1e7)


@dataclass(frozen=True)
class Trial:
    """A part exchanged. exchanged: in words. abs_logprob, k3: of the gap that is left, nats."""

    part: str
    exchanged: str
    setting: Setting
    abs_logprob: float
    k3: float


class NotMeasured(Exception):
    """A part cannot be exchanged here; the message says why."""


Candidates = Callable[[Bench, Setting], Iterable[tuple[str, Setting]]]


def try_part(part: str, bench: Bench, setting: Setting) -> Trial:
    """The exchange of one part that leaves the least of the gap; of equal ones the first. Raises NotMeasured."""
    trials = []
    for words, exchanged in PARTS[part](bench, setting):
        gap = bench.gap(exchanged)
        trials.append(Trial(part, words, exchanged, gap.abs_logprob, gap.k3))
    least = min(t.abs_logprob for t in trials)
    return next(t for t in trials if t.abs_logprob <= 1.1 * least + EQUAL)


def _labels(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    if setting.server != "sampled":
        raise NotMeasured("the server's second pass has its own labels")
    if bench.has_mask and not setting.unmasked:
        raise NotMeasured("a token beside the sampled one may be none of those that the sampler kept")
    for by in (-1, 1):
        words = f"the trainer's label is the token one place {'earlier' if by < 0 else 'later'}"
        yield words, replace(setting, label_shift=setting.label_shift + by)
    if all(len(r) == 1 for r in bench.rollouts):
        return
    for by in (-1, 1):
        words = f"the server's value of a token is the trainer's of the {'one before' if by < 0 else 'next one'}"
        yield words, replace(setting, offset=setting.offset + by)


def _temperature(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    if setting.server != "sampled":
        raise NotMeasured("the server's second pass is at temperature 1")
    now = setting.temperature or bench.loop.config.precision.temperature
    best = _fit(lambda t: replace(setting, temperature=t), bench, [now * factor for factor in TEMPERATURES])
    yield f"the trainer's log-probs are taken at temperature {best:.4g}", replace(setting, temperature=best)


def _mask(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    if not bench.has_mask:
        raise NotMeasured("the sampler kept all tokens")
    if setting.server != "sampled" or setting.unmasked:
        raise NotMeasured("it is exchanged already")
    yield "the trainer's log-probs are over the whole vocabulary", replace(setting, unmasked=True)


def _head(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    for head in get_args(Head):
        if head != setting.head:
            yield f"the trainer's LM head is {head}", replace(setting, head=head)


def _routing(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    if not bench.loop.shape.num_experts:
        raise NotMeasured("the model has no experts")
    if not bench.has_routes:
        raise NotMeasured("the rollouts came without routes; replay=r3 asks for them")
    if setting.routes != "rollout":
        yield "the trainer takes the routes of the rollouts", replace(setting, routes="rollout")
    if setting.routes != "rescored" and setting.server == "sampled" and bench.can_score:
        yield "the trainer takes the routes of the server's second pass", replace(setting, routes="rescored")
    if setting.routes != "native":
        yield "the trainer routes natively", replace(setting, routes="native")


def _rope(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    now = setting.rope_theta or exchangeable_rope_theta(bench.loop.shape)
    if now is None:
        raise NotMeasured("the rotary embedding of this model is scaled, or inside multi-latent attention")
    best = _fit(lambda theta: replace(setting, rope_theta=theta), bench, [t for t in ROPE_THETAS if t != now])
    yield f"the trainer's rope_theta is {best:.6g}", replace(setting, rope_theta=best)


def _sampling(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    _needs_server(bench)
    if setting.server != "sampled":
        raise NotMeasured("it is exchanged already")
    yield "the server's log-probs are of a second pass over the same tokens", replace(setting, server="rescored")


def _weights(bench: Bench, setting: Setting) -> Iterable[tuple[str, Setting]]:
    _needs_server(bench)
    if setting.server == "resent":
        raise NotMeasured("they are exchanged already")
    yield "the trainer's weights are sent to the server again", replace(setting, server="resent")


def _needs_server(bench: Bench) -> None:
    if not bench.can_score:
        raise NotMeasured("there is no server")


PARTS: dict[str, Candidates] = {
    "tokens and labels": _labels,
    "temperature": _temperature,
    "sampling mask": _mask,
    "LM head": _head,
    "routing": _routing,
    "rotary embedding": _rope,
    "sampling": _sampling,
    "weights": _weights,
}


WHOLESALE = ("sampling", "weights")
"""Parts whose exchange brings another measurement of the server, and with it much besides."""


def _fit(at: Callable[[float], Setting], bench: Bench, grid: list[float]) -> float:
    """The positive number that leaves the least gap: the best of a grid, refined between its neighbours, and taken
    round where that is no worse."""

    from scipy.optimize import minimize_scalar  # 0.4 s, which a run whose engines agree does without

    def left(value: float) -> float:
        return bench.gap(at(value)).abs_logprob

    grid = sorted(grid)
    lefts = [left(value) for value in grid]
    k = lefts.index(min(lefts))
    lower, upper = (math.log(grid[min(max(i, 0), len(grid) - 1)]) for i in (k - 1, k + 1))
    found: Any = minimize_scalar(lambda x: left(math.exp(x)), (lower, upper), bounds=(lower, upper), method="bounded",
                            options={"xatol": 1e-3, "maxiter": 16})  # fmt: skip
    exact = math.exp(float(found["x"]))
    candidates = [float(f"{exact:.{digits}g}") for digits in (1, 2, 3)] + [grid[k], exact]
    least = min(left(value) for value in candidates)
    return next(value for value in candidates if left(value) <= 1.1 * least + 1e-9)
