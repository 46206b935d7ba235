"""A picture of a run: reward, mismatch of the two engines, response length, each over steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WINDOW = 5  # steps of the running mean
_BLUE, _ORANGE, _GREY = "#2563a8", "#d9722b", "#6b7280"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl. Raises ValueError for a line that is not JSON, by number, or for no steps."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no steps, so there is nothing to draw")
    return rows


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[steps] mean of each value and up to window - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def write_summary(metrics_path: str | Path, png_path: str | Path) -> Path:
    """Draw metrics.jsonl as a PNG of three panels; returns its path.

    Raises ValueError where a step lacks one of the keys drawn, by name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = read_metrics(metrics_path)
    steps = _column(rows, "step")
    with pyplot.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlepad": 10}):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure, (reward, mismatch, length) = pyplot.subplots(1, 3, figsize=(13.5, 3.9), layout=layout)
        _reward(reward, steps, rows)
        _mismatch(mismatch, steps, rows)
        _length(length, steps, rows)
        for axes in (reward, mismatch, length):
            _style(axes)
        figure.savefig(png_path, dpi=120)
        pyplot.close(figure)
    return Path(png_path)


def _column(rows: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    """[steps] float64."""
    for row in rows:
        if key not in row:
            raise ValueError(f"step {row.get('step', '?')} has no metric {key!r}")
    return np.array([row[key] for row in rows], np.float64)


def _reward(axes: Axes, steps: np.ndarray, rows: Sequence[Mapping[str, float]]) -> None:
    values = _column(rows, "reward/mean")
    axes.plot(steps, values, color=_BLUE, alpha=0.35, linewidth=1, marker=".", markersize=3, label="each step")
    axes.plot(steps, running_mean(values, _WINDOW), color=_BLUE, linewidth=2, label=f"mean of {_WINDOW} steps")
    if values.min() >= 0 and values.max() <= 1:
        axes.set_ylim(-0.03, 1.03)
    axes.set(title="Reward", ylabel="mean reward of a rollout")
    axes.legend(frameon=False, loc="best")


def _mismatch(axes: Axes, steps: np.ndarray, rows: Sequence[Mapping[str, float]]) -> None:
    drawn = (("mismatch/abs_logprob", "mean |difference|", _ORANGE), ("mismatch/k3", "k3", _BLUE))
    columns = [(_column(rows, key), label, color) for key, label, color in drawn]
    for values, label, color in columns:
        axes.plot(steps, values, color=color, linewidth=1.5, marker=".", markersize=3, label=label)
    if all((values > 0).any() for values, _, _ in columns):
        axes.set_yscale("log")
    axes.set(title="Mismatch of trainer and rollout engine", ylabel="log-probs, nats a token")
    axes.legend(frameon=False, loc="best")


def _length(axes: Axes, steps: np.ndarray, rows: Sequence[Mapping[str, float]]) -> None:
    axes.plot(steps, _column(rows, "response/length_mean"), color=_BLUE, linewidth=1.5, label="mean")
    if all("response/length_max" in row for row in rows):
        longest = _column(rows, "response/length_max")
        axes.plot(steps, longest, color=_GREY, linewidth=1, linestyle="--", label="longest")
        axes.legend(frameon=False, loc="best")
    axes.set_ylim(bottom=0)
    axes.set(title="Response length", ylabel="tokens")


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
