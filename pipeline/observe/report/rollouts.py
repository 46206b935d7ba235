"""Sampled answers as cards, token by token, coloured by how far two policies are apart."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.observe.report.run_files import Run

_STEPS = 6  # whose rollouts the report shows
LEVELS = 7
_PREVIEW = 60  # characters of what was said, and of the reply
SMALLEST_DECADE = -7  # the faintest colour begins at 1e-7 nats, the strongest at 0.1


@dataclass(frozen=True)
class Token:
    """text: as decoded. title: its numbers. classes: a level for each way of colouring, such as "m-3 u0 s5"."""

    text: str
    title: str
    classes: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. line: all of it."""

    name: str
    arguments: str
    result: str

    @property
    def line(self) -> str:
        return f"{self.name}: {_line(self.arguments)} \u2192 {_line(self.result)}"


@dataclass(frozen=True)
class Turn:
    """What the policy said in one go, and what others said then. hidden, reply_hidden: tokens that are not shown.

    title: "" for an answer of one turn. preview: both in a line. calls: tools that it called, if that is known.
    """

    title: str
    tokens: tuple[Token, ...]
    hidden: int
    reply: str = ""
    reply_hidden: int = 0
    calls: tuple[ToolCall, ...] = ()

    @property
    def preview(self) -> str:
        said = "".join(token.text for token in self.tokens)
        return _line(said) + (f" \u2192 {_line(self.reply)}" if self.reply else "")


@dataclass(frozen=True)
class Card:
    """One answer. facts: name and value. turns: the last one is the answer, those before it are folded."""

    prompt: str
    facts: tuple[tuple[str, str], ...]
    turns: tuple[Turn, ...]


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
        *([("turns", str(turns))] if (turns := len(rollout.get("turns", ()))) > 1 else []),
        ("sample", f"{rollout['sample'] + 1} of {rollout['samples']}, prompt {rollout['index']}"),
        ("weights", ", ".join(map(str, rollout["versions"])) or "none"),
        *rollout["metadata"].items(),
    ]
    return Card(rollout["prompt"], tuple(facts), _turns(rollout))


def _turns(rollout: dict[str, Any]) -> tuple[Turn, ...]:
    """Of a record; one that an earlier version wrote has one turn."""
    names = ("text", "rollout", "proximal", "current", "entropy")
    rows = list(zip(*(rollout[name] for name in names), strict=True))
    told, numbers = rollout.get("turns", [{}]), rollout.get("turn", [0] * len(rows))
    runs = iter(rollout.get("runs", [rollout["length"]]))
    out: list[Turn] = []
    for number, group in itertools.groupby(zip(numbers, rows, strict=True), key=lambda pair: pair[0]):
        own, length = [row for _, row in group], next(runs)
        hidden = length - len(own)
        if number is not None:
            title = _title(number, told[number]) if len(told) > 1 else ""
            calls = tuple(ToolCall(*call) for call in told[number].get("calls", ()))
            out.append(Turn(title, tuple(_token(*row) for row in own), hidden, calls=calls))
        elif out:
            text = "".join(row[0] for row in own)
            out[-1] = dataclasses.replace(out[-1], reply=text, reply_hidden=hidden)
    return tuple(out) or (Turn("", (), rollout["length"]),)


def _title(number: int, told: dict[str, Any]) -> str:
    reward = "" if told["reward"] is None else f", reward {_number(told['reward'], '.3g')}"
    anew = ", in a rollout of its own" if told["anew"] else ""
    return f"Turn {number + 1}{reward}, advantage {_number(told['advantage'], '+.3g')}{anew}"


def _line(text: str) -> str:
    """The beginning of a text."""
    line = " ".join(text.split())
    return line if len(line) <= _PREVIEW else f"{line[:_PREVIEW]}\u2026"


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
