"""A figure with its captions, and lines over steps: what most figures of the report are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from pipeline.observe.report.run_files import Run
from pipeline.observe.report.theme import DASHES, blank

WINDOW = 5  # steps of the running mean, and of a run's beginning and end


@dataclass(frozen=True)
class Figure:
    """caption: what is drawn. good, bad: how to read it. now: this run in numbers. plot: None where there is nothing to
    draw, and `missing` says why."""

    name: str
    title: str
    caption: str
    good: str
    bad: str
    now: str = ""
    plot: go.Figure | None = None
    missing: str = ""


@dataclass(frozen=True)
class Section:
    """Figures that answer one question."""

    title: str
    figures: tuple[Figure, ...]


def line_plot(
    run: Run, lines: Mapping[str, str], unit: str, *, log: bool = False, percent: bool = False
) -> go.Figure | None:
    """A line a metric that the run has; None for none. A log axis has no 0: a line's name says where it is 0."""
    drawn = {key: label for key, label in lines.items() if len(present(run, key)[0])}
    if not drawn:
        return None
    plot = blank(unit)
    form = "%{y:.2%}" if percent else "%{y:.4g}"
    columns = {key: run.column(key) for key in drawn}
    above = np.concatenate([values[values > 0] for values in columns.values()])
    log = log and len(above) > 0
    for (key, label), dash in zip(drawn.items(), DASHES, strict=False):
        values = columns[key]
        if log and (values <= 0).any():
            label = f"{label} (0 {'at gaps' if (values > 0).any() else 'throughout'})"
            values = np.where(values > 0, values, np.nan)
        plot.add_scatter(
            x=run.steps, y=values, name=label, mode=mode(run.steps), line={"dash": dash}, hovertemplate=form
        )
    plot.update_layout(showlegend=len(drawn) > 1)
    if log:
        narrow = above.max() < 1000 * above.min()
        plot.update_yaxes(type="log", exponentformat="e", nticks=6, dtick="D2" if narrow else None)
    if percent:
        plot.update_yaxes(tickformat=".0%", rangemode="tozero")
    return plot


def present(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that have a metric, and its values."""
    values = run.column(key)
    where = np.isfinite(values)
    return run.steps[where], values[where]


def mode(steps: Sequence[int] | np.ndarray) -> str:
    return "lines+markers" if len(steps) <= 60 else "lines"


def absent(run: Run, *keys: str) -> str:
    """Why none of these metrics can be drawn."""
    if any(run.has(key) for key in keys):
        return ""
    if not run.metrics:
        return "No step is recorded yet."
    return f"No step of this run has the metric {' or '.join(keys)}."


def ends(values: np.ndarray, form: str) -> str:
    """The beginning and the end of a run in words."""
    say: Callable[[float], str] = form.format
    if not len(values):
        return ""
    if len(values) == 1:
        return f"{say(values[0])} in the only step."
    if len(values) < 2 * WINDOW:
        return f"{say(values[0])} in the first step, {say(values[-1])} in the last."
    first, last = float(np.mean(values[:WINDOW])), float(np.mean(values[-WINDOW:]))
    return f"{say(first)} in the first {WINDOW} steps, {say(last)} in the last {WINDOW}."
