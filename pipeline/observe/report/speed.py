"""Figures of where the time goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.observe.report.figure import Figure, absent, line_plot
from pipeline.observe.report.run_files import Run
from pipeline.observe.report.theme import blank

_PHASES = {
    "rollout": "sampling",
    "reward": "grading",
    "wait": "waiting for rollouts",
    "check": "comparing the engines",
    "dump": "dump",
    "logprob": "proximal log-probs",
    "train": "update",
    "pause": "interrupting answers in flight",
    "sync": "weights to the server",
}
_BARS = 300  # more cannot be told apart
_WITHIN = {"logprob": "train"}  # a phase whose time is also counted in another


def time(run: Run) -> Figure:
    present = {k[5:-2] for row in run.metrics for k in row if k.startswith("time/") and k.endswith("_s")} - {"step"}
    seconds = {phase: _seconds(run, phase) for phase in present}
    for inner, outer in _WITHIN.items():
        if inner in seconds and outer in seconds:
            seconds[outer] = np.maximum(seconds[outer] - seconds[inner], 0.0)
    total = sum(seconds.values(), np.zeros(len(run.metrics)))
    if run.has("time/step_s"):
        seconds["other"] = np.maximum(_seconds(run, "step") - total, 0.0)
    order = [p for p in (*_PHASES, *sorted(present - set(_PHASES)), "other") if p in seconds]
    plot, every, now = None, "", ""
    if order:
        steps, columns, every = _averaged(run.steps, [seconds[p] for p in order])
        plot = blank("seconds a step")
        for phase, values in zip(order, columns, strict=True):
            label = _PHASES.get(phase, phase)
            plot.add_bar(x=steps, y=values, name=label, hovertemplate="%{y:.3g} s")
        plot.update_layout(barmode="stack", bargap=0.1 if len(steps) <= 60 else 0)
        spent = {p: float(seconds[p].sum()) for p in order}
        largest = sorted(order, key=lambda p: -spent[p])[:3]
        now = ", ".join(f"{_PHASES.get(p, p)} {spent[p] / max(sum(spent.values()), 1e-9):.0%}" for p in largest) + "."
    return Figure(
        "time",
        "Time by phase",
        "Wall-clock seconds of a step." + every,
        "Sampling and update share most of it.",
        "A growing bar: answers get longer, or something leaks. A large share for weights: the transfer is the limit.",
        now,
        plot,
        "" if order else "No step has written its times yet.",
    )


def throughput(run: Run) -> Figure:
    lines = {
        "throughput/rollout_tokens_per_s": "sampled (response tokens)",
        "throughput/train_tokens_per_s": "trained (prompt and response tokens)",
    }
    plot = line_plot(run, lines, "tokens/s")
    if plot is not None:
        plot.update_yaxes(rangemode="tozero")
    means = [
        f"{label.split(' ')[0]} {np.nanmean(run.column(key)):,.0f}" for key, label in lines.items() if run.has(key)
    ]
    return Figure(
        "throughput",
        "Tokens a second",
        "Of the whole run, not of one device.",
        "Steady.",
        "A slow decline: longer answers, a fuller cache, or another program on the machine.",
        f"Mean: {', '.join(means)} tokens/s." if means else "",
        plot,
        absent(run, *lines),
    )


def idle(run: Run) -> list[Figure]:
    """None where no step has counted its device-hours."""
    lines = {"devices/trainer_idle": "trainer", "devices/servers_idle": "servers"}
    if not run.has("devices/hours"):
        return []
    hours, unused = (float(np.nanmax(run.column(f"devices/{name}"))) for name in ("hours", "idle_hours"))
    tokens = float(np.nanmean(run.column("devices/tokens_per_hour")))
    now = f"{hours:,.3g} device-hours so far, {unused:,.3g} of them idle ({unused / max(hours, 1e-12):.0%}); "
    now += f"{tokens:,.0f} trained tokens an hour of a device."
    if run.has("devices/cost"):
        now += f" Cost: {np.nanmax(run.column('devices/cost')):,.2f}."
    return [
        Figure(
            "idle",
            "Idle devices",
            "Share of a step in which the trainer, or the servers, have nothing to do. A device is a GPU, or a process "
            "where there are none. Sums are since the run, or its resumption, began.",
            "Low on both sides: with rollout.max_staleness above 0 they work beside each other.",
            "One side idle for half of the step: give the other more devices, or let it run ahead.",
            now,
            line_plot(run, lines, "share of the step", percent=True),
        )
    ]


def _seconds(run: Run, phase: str) -> np.ndarray:
    """[steps] of a phase; a step that did not run it took no time for it."""
    seconds = run.column(f"time/{phase}_s")
    return np.where(np.isnan(seconds), 0.0, seconds)


def _averaged(steps: np.ndarray, columns: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], str]:
    """Means over runs of consecutive steps where there are more than _BARS, and a sentence that says so."""
    width = math.ceil(len(steps) / _BARS)
    if width <= 1:
        return steps, list(columns), ""
    starts = np.arange(0, len(steps), width)
    sizes = np.diff(starts, append=len(steps))
    return steps[starts], [np.add.reduceat(c, starts) / sizes for c in columns], f" A bar is the mean of {width} steps."
