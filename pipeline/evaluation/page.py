"""What an evaluation came to, for people: a table on the terminal, and evaluation.html, one file without a network."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.evaluation.result import Evaluation
from pipeline.observe.report.figure import Figure
from pipeline.observe.report.html import render_page
from pipeline.observe.report.theme import blank
from pipeline.text.characters import visible

_WRONG, _RIGHT = 12, 6  # answers of a set that are shown
_MOST_BINS = 11


def table(found: Sequence[Evaluation]) -> str:
    """Scores with their 95% intervals, a row each."""
    drawn = Table("set", "score", "value", "95% interval", "questions", "length", "cut", box=None, pad_edge=False)
    for one in found:
        numbers = one.numbers
        for i, (name, score) in enumerate(one.scores.items()):
            of_set = [f"{numbers['length_mean']:.1f}", f"{numbers['truncated_fraction']:.1%}"] if i == 0 else []
            drawn.add_row(
                visible(one.name) if i == 0 else "",
                name,
                f"{score.value:.3f}",
                f"{score.low:.3f} to {score.high:.3f}",
                f"{score.questions:,}",
                *of_set,
            )
    out = io.StringIO()
    Console(file=out, width=110, highlight=False, no_color=True).print(drawn)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    lines += [f"{one.name}: {one.numbers['failed']:.0f} answers could not be graded, and are in no score"
              for one in found if one.numbers["failed"]]  # fmt: skip
    return "\n".join(lines)


def write_page(found: Sequence[Evaluation], path: Path, *, name: str) -> None:
    """Write it; the file appears whole or not at all. name: of the model."""
    figures = {one.name: pass_rates(one) for one in found}
    text = render_page(
        Path(__file__).with_name("page.html"),
        list(figures.values()),
        name=name,
        sets=[(one, figures[one.name], _shown(one.answers)) for one in found],
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def pass_rates(one: Evaluation) -> Figure:
    """How many questions are passed by which share of their answers."""
    questions = [list(own) for _, own in groupby(one.answers, key=lambda answer: answer["question"])]
    rates = np.array([np.mean([answer["passed"] for answer in own]) for own in questions])
    bins = min(_MOST_BINS, 1 + max(map(len, questions)))
    counts = np.bincount(np.round(rates * (bins - 1)).astype(int), minlength=bins)
    plot = blank("questions")
    plot.add_bar(x=np.linspace(0, 1, bins), y=counts, hovertemplate="%{x:.0%}: %{y} questions<extra></extra>")
    plot.update_xaxes(title={"text": "share of a question's answers that pass"}, tickformat=".0%")
    plot.update_layout(hovermode="closest", showlegend=False)
    return Figure(
        f"pass_rates_{one.name}",
        "Pass rates",
        "Questions by the share of their answers that pass.",
        "Moves to the right from one evaluation to the next.",
        "Two piles at the ends, none between: nothing is left that a few more answers would solve.",
        plot=plot,
    )


def _shown(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few answers that do not pass and a few that do, of different questions."""
    first = {(a["question"], a["passed"]): a for a in reversed(answers)}
    wrong = [a for (_, passed), a in sorted(first.items()) if not passed][:_WRONG]
    return wrong + [a for (_, passed), a in sorted(first.items()) if passed][:_RIGHT]
