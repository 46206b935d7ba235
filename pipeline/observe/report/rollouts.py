"""Sampled answers as cards, token by token, coloured by how far two policies are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.observe.report.run_files import Run

_STEPS = 6  # whose rollouts the report shows
LEVELS = 7
SMALLEST_DECADE = -7  # the faintest colour begins at 1e-7 nats, the strongest at 0.1


@dataclass(frozen=True)
class Token:
    """text: as decoded. title: its numbers. classes: a level for each way of colouring, such as "m-3 u0 s5"."""

    text: str
    title: str
    classes: str


@dataclass(frozen=True)
class Card:
    """One answer. facts: name and value. hidden: tokens that are not shown."""

    prompt: str
    facts: tuple[tuple[str, str], ...]
    tokens: tuple[Token, ...]
    hidden: int


@dataclass(frozen=True)
class Shown:
    """The answers of a step. file: their readable form, relative to the run."""

    step: int
    cards: tuple[Card, ...]
    file: str


def shown_steps(run: Run) -> list[Shown]:
    """The first step, the last, and some between, of those that left rollouts."""
    steps = [step for step in run.steps.tolist() if (run.path / "rollouts" / f"step_{step:06d}.json").is_file()]
    places = np.unique(np.linspace(0, len(steps) - 1, _STEPS).round().astype(int)) if steps else []
    return [
        Shown(steps[i], tuple(map(card, run.rollouts(steps[i]))), f"rollouts/step_{steps[i]:06d}.txt") for i in places
    ]


def card(rollout: dict[str, Any]) -> Card:
    """A rollout of step_record.shown_rollouts."""
    facts = [
        ("reward", _number(rollout["reward"], ".3g")),
        ("advantage", _number(rollout["advantage"], "+.3g")),
        ("ended by", {"stop": "a stop token", "length": "the limit", "abort": "an abort"}[rollout["finish_reason"]]),
        ("tokens", f"{rollout['length']:,}"),
        ("sample", f"{rollout['sample'] + 1} of {rollout['samples']}, prompt {rollout['index']}"),
        ("weights", ", ".join(map(str, rollout["versions"])) or "none"),
        *rollout["metadata"].items(),
    ]
    columns = (rollout[name] for name in ("text", "rollout", "proximal", "current", "entropy"))
    tokens = tuple(_token(*row) for row in zip(*columns, strict=True))
    return Card(rollout["prompt"], tuple(facts), tokens, rollout["length"] - len(tokens))


def _token(
    text: str, rollout: float | None, proximal: float | None, current: float | None, entropy: float | None
) -> Token:
    mismatch, update = _difference(proximal, rollout), _difference(current, proximal)
    title = (
        f"{text!r}\n"
        f"server {_number(rollout, '.6f')}, trainer {_number(proximal, '.6f')} nats\n"
        f"trainer - server {_number(mismatch, '+.2e')}\n"
        f"updated - trainer {_number(update, '+.2e')}\n"
        f"probability {_number(None if rollout is None else math.exp(min(rollout, 0.0)), '.1%')}, "
        f"entropy {_number(entropy, '.3f')} nats"
    )
    classes = f"m{signed_level(mismatch)} u{signed_level(update)} s{surprise_level(rollout)}"
    return Token(text.replace("\n", "\u23ce\n"), title, classes)


def _difference(a: float | None, b: float | None) -> float | None:
    # In float32, as the trainer has it: the decimals are those of float32.
    return None if a is None or b is None else float(np.float32(a) - np.float32(b))


def signed_level(log_ratio: float | None) -> int:
    """-7 .. 7: the decade of a log-ratio, 1 from 1e-7 nats on, 7 from 0.1 on, with its sign. No number counts as 7."""
    if log_ratio is None:
        return LEVELS
    if abs(log_ratio) < 10.0**SMALLEST_DECADE:
        return 0
    level = min(math.floor(math.log10(abs(log_ratio))) - SMALLEST_DECADE + 1, LEVELS)
    return level if log_ratio > 0 else -level


def surprise_level(logprob: float | None) -> int:
    """0 .. 6: how improbable the token was for the server: 0 down to 90%, then 50, 25, 10, 3 and 1%. No number: 6."""
    if logprob is None:
        return len(SURPRISE)
    return sum(math.exp(min(logprob, 0.0)) < bound for bound in SURPRISE)


SURPRISE: Sequence[float] = (0.9, 0.5, 0.25, 0.1, 0.03, 0.01)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
