"""Histograms of log-ratios, on an axis that has a decade between marks on either side of 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pipeline.observe.report.theme import BOUND, DASHES, blank, thinned
from pipeline.observe.step_record import BIN_EDGES, LARGEST, PER_DECADE, SMALLEST

_CENTRE = len(BIN_EDGES) // 2  # the bin around 0; bins are drawn at -_CENTRE .. _CENTRE
_MARGIN = 2  # empty bins beside those that count something


@dataclass(frozen=True)
class Ratio:
    """A histogram of records.jsonl. share: [93] float64. bounds: the log-ratios beyond which the surrogate clips."""

    level: str
    share: np.ndarray
    nonfinite: int
    bounds: tuple[float | None, float | None]

    @property
    def moved(self) -> bool:
        """Whether any ratio differs from 1."""
        return bool(self.share[_CENTRE] < 1)


def ratio_of(record: Mapping[str, Any], name: str) -> Ratio | None:
    """A ratio of a line of records.jsonl; None where the line has none, or none by these bins."""
    found = (record.get("ratios") or {}).get(name)
    if not found or len(found["counts"]) != len(BIN_EDGES) + 1 or not sum(found["counts"]):
        return None
    counts = np.array(found["counts"], np.float64)
    low, high = found["bounds"]
    return Ratio(found["level"], counts / counts.sum(), found["nonfinite"], (low, high))


def draw_ratio_of_steps(ratios: Mapping[int, Ratio]) -> go.Figure:
    """The first step, the one in the middle and the last, over each other."""
    steps = list(ratios)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    figure = blank(f"share of the {ratios[steps[0]].level}s")
    low, high = _range([ratios[step] for step in chosen])
    bins = np.arange(low, high + 1)
    for step, dash in zip(chosen, DASHES, strict=False):
        figure.add_scatter(
            x=bins,
            y=ratios[step].share[bins + _CENTRE],
            name=f"step {step}",
            line={"shape": "hvh", "dash": dash},
            customdata=[_words(b) for b in bins.tolist()],
            hovertemplate=f"step {step}, log-ratio %{{customdata}}: %{{y:.2%}}",
        )
    for bound in ratios[chosen[-1]].bounds:
        if bound is not None:
            figure.add_vline(x=_place(bound), line=BOUND)
    figure.update_layout(hovermode="closest", showlegend=True)
    figure.update_xaxes(**_axis(low, high), title={"text": "log-ratio, nats"}, showgrid=False)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def draw_ratio_by_step(ratios: Mapping[int, Ratio]) -> tuple[go.Figure, str]:
    """All steps as a heat map, and a sentence where only some of them are drawn."""
    shown, every = thinned(list(ratios.items()))
    low, high = _range([ratio for _, ratio in shown])
    bins = np.arange(low, high + 1)
    z = np.stack([ratio.share[bins + _CENTRE] for _, ratio in shown], axis=1)
    figure = blank("log-ratio, nats")
    figure.add_heatmap(
        x=[step for step, _ in shown],
        y=[_words(b) for b in bins.tolist()],
        z=np.log10(np.where(z > 0, z, np.nan)),
        zmin=-3.0,
        zmax=0.0,
        customdata=z.astype(np.float32),
        hovertemplate="step %{x}, log-ratio %{y}: %{customdata:.2%}<extra></extra>",
        colorbar={"tickvals": [-3, -2, -1, 0], "ticktext": ["0.1%", "1%", "10%", "100%"], "thickness": 12},
    )
    for bound in shown[-1][1].bounds:
        if bound is not None:
            figure.add_hline(y=_place(bound) - low, line=BOUND)
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(showgrid=False)
    # By the words of the bins, which hovering shows: a category's place is its position from `low`.
    figure.update_yaxes(**_axis(low, high, first=low), type="category", showgrid=False)
    return figure, every


def _range(ratios: list[Ratio]) -> tuple[int, int]:
    """The bins to draw: all that count something, the bounds, and a little more."""
    used = [b for ratio in ratios for b in (np.flatnonzero(ratio.share)[[0, -1]] - _CENTRE).tolist()]
    used += [round(_place(bound)) for ratio in ratios for bound in ratio.bounds if bound is not None]
    return max(min(used) - _MARGIN, -_CENTRE), min(max(used) + _MARGIN, _CENTRE)


def _place(log_ratio: float) -> float:
    """Where a log-ratio lies among the bins."""
    decades = math.log10(max(abs(log_ratio), 10.0**SMALLEST)) - SMALLEST
    return math.copysign(0.5 + decades * PER_DECADE, log_ratio) if log_ratio else 0.0


def _axis(low: int, high: int, first: int = 0) -> dict[str, Any]:
    """Marks at whole decades within the bins that are drawn, fewer where they would touch. first: bin at place 0."""
    every = math.ceil((high - low) / (6 * PER_DECADE))
    decades = [d for d in range(SMALLEST + 1, LARGEST + 1) if (d - LARGEST) % every == 0]
    marks = {_place(sign * 10.0**d): f"{sign * 10.0**d:g}" for d in decades for sign in (-1, 1)} | {0.0: "0"}
    kept = {place: text for place, text in marks.items() if low - 0.5 <= place <= high + 0.5}
    return {
        "tickmode": "array",
        "tickangle": 0,
        "tickvals": [place - first for place in kept],
        "ticktext": list(kept.values()),
        "range": [low - first - 0.5, high - first + 0.5],
    }


def _words(b: int) -> str:
    """The log-ratios of a bin."""
    k = b + _CENTRE
    if k == 0:
        return f"below {BIN_EDGES[0]:g}"
    if k == len(BIN_EDGES):
        return f"above {BIN_EDGES[-1]:g}"
    return f"{BIN_EDGES[k - 1]:.2g} to {BIN_EDGES[k]:.2g}"
