"""Figures of evaluations, and of what the verifiers gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.observe.report.figure import Figure, absent, ends, line_plot, mode, present
from pipeline.observe.report.run_files import Run
from pipeline.observe.report.theme import DASHES, blank

_NOT_COMPONENTS = {"mean", "std", "uninformative_groups", "failed", "groups_dropped"}


def evaluations(run: Run) -> list[Figure]:
    """A figure a set."""
    return [_evaluation(run, name) for name in sorted({row["set"] for row in run.evaluations})]


def _evaluation(run: Run, name: str) -> Figure:
    rows = [row for row in run.evaluations if row["set"] == name and "scores" in row]
    skipped = [row for row in run.evaluations if row["set"] == name and "skipped" in row]
    steps = [row["step"] for row in rows]
    plot = blank("share") if rows else None
    scores = [score for score in dict.fromkeys(s for row in rows for s in row["scores"]) if not _same(rows, score)]
    first: np.ndarray = np.zeros(0)
    for score, dash in zip(scores, DASHES, strict=False):
        value, low, high = np.array([row["scores"].get(score, [math.nan] * 3) for row in rows]).T
        first = value if not len(first) else first
        assert plot is not None
        plot.add_scatter(
            x=steps,
            y=value,
            name=score,
            mode=mode(steps),
            line={"dash": dash},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "width": 3},
            hovertemplate="%{y:.3f}",
        )
    left_out = "".join(f" Left out after step {row['step']}: {row['skipped']}." for row in skipped[:5])
    return Figure(
        f"evaluation_{name}",
        f"Evaluation: {name}",
        "Scores on questions that are not trained on, with 95% intervals over the questions.",
        "They rise with the reward. pass@k stays above pass@1.",
        "The reward rises and they do not: the questions that are trained on are learned by heart, or the reward is "
        "cheated. pass@k falls while pass@1 rises: the answers become all alike.",
        (f"{scores[0]}: {ends(first, '{:.3f}')}" if scores else "") + left_out,
        plot,
        "" if rows else "No evaluation of this set is recorded yet.",
    )


def _same(rows: Sequence[Mapping[str, Any]], score: str) -> bool:
    """Whether a score says what the reward says: of verifiers that give 0 or 1."""
    return score == "pass@1" and all(row["scores"].get(score) == row["scores"].get("reward") for row in rows)


def components(run: Run) -> list[Figure]:
    """What each of several verifiers gave; none where there is one."""
    keys = sorted({k for row in run.metrics for k in row if k.startswith("reward/")})
    lines = {
        key: name
        for key in keys
        if (name := key.removeprefix("reward/")) not in _NOT_COMPONENTS and not name.startswith("failures_")
    }
    if len(lines) < 2:
        return []
    return [
        Figure(
            "components",
            "Parts of the reward",
            "Mean of what each verifier gave, before its weight.",
            "The part that is the task rises.",
            "A part that only helps (a format, a length) rises while the task's own part stays: it is easier to earn; "
            "lower its weight.",
            now="; ".join(f"{name}: {ends(present(run, key)[1], '{:.3f}')[:-1]}" for key, name in lines.items()) + ".",
            plot=line_plot(run, lines, "reward"),
        )
    ]


def failures(run: Run) -> list[Figure]:
    """Answers that verifiers failed on, by kind; none where there were none."""
    keys = sorted({k for row in run.metrics for k, v in row.items() if k.startswith("reward/failures_") and v})
    if not keys:
        return []
    lines = {key: key.removeprefix("reward/failures_").replace("_", " ") for key in keys}
    total = float(np.nansum(run.column("reward/failed")))
    return [
        Figure(
            "failures",
            "Answers that could not be graded",
            "Verifiers that hung, crashed or gave no number, by kind, in each step.",
            "There are none.",
            "Any that stay: the verifier is wrong, or too slow for grading.timeout_s; the console names the first.",
            f"{total:g} in all.",
            line_plot(run, lines, "answers"),
        )
    ]


def pass_rates(run: Run) -> Figure:
    """How many prompts of a step are passed by which share of their answers."""
    rows = [(step, record["pass_rates"]) for step, record in run.records.items() if "pass_rates" in record]
    plot, now = None, ""
    if rows:
        counts = np.array([counts for _, counts in rows], float)
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        bins = shares.shape[1]
        now = f"In the last step {shares[-1, 0]:.0%} of the prompts at 0%, {shares[-1, -1]:.0%} at 100%."
        plot = blank("answers that pass")
        plot.add_heatmap(
            x=[step for step, _ in rows],
            y=np.linspace(0, 1, bins),
            z=shares.T,
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "prompts"}, "tickformat": ".0%"},
            hovertemplate="step %{x}, %{y:.0%} of the answers: %{z:.0%} of the prompts<extra></extra>",
        )
        plot.update_yaxes(tickformat=".0%")
        plot.update_layout(hovermode="closest")
    return Figure(
        "pass_rates",
        "Pass rates of prompts",
        "Prompts of a step by the share of their answers that pass (data.curriculum.passing_reward).",
        "Prompts move from the bottom to the top, and many are in between: those teach.",
        "All at the bottom or all at the top: nothing is left to learn from; see data.curriculum.",
        now,
        plot,
        "" if rows else absent(run, "reward/mean") or "No step of this run has recorded pass rates.",
    )
