"""Figures of rollouts that are made beside the training: how old they are, and who waits."""

from __future__ import annotations

import re

from pipeline.observe.report.figure import Figure, absent, ends, line_plot, present
from pipeline.observe.report.run_files import Run


def figures(run: Run) -> list[Figure]:
    """All of them; of a run with rollout.max_staleness above 0."""
    return [lag(run), staleness(run), idle(run), lengths(run)]


def lag(run: Run) -> Figure:
    lines = {"rollout/lag_mean": "mean", "rollout/lag_max": "largest"}
    plot = line_plot(run, lines, "versions")
    return Figure(
        "lag",
        "Versions behind",
        "How many versions of the weights the tokens of a step are older than the weights that train on them.",
        "The largest stays at rollout.max_staleness or below, always.",
        "A mean near the largest for long: if servers and trainer are as busy with a smaller rollout.ahead, that gives "
        "younger rollouts at the same speed.",
        ends(present(run, "rollout/lag_mean")[1], "{:.2f} versions on average"),
        plot,
        absent(run, *lines),
    )


def staleness(run: Run) -> Figure:
    found = sorted({key for row in run.metrics for key in row if re.fullmatch(r"staleness/k3_lag_\d+", key)})
    lines = {key: f"{key.rpartition('_')[2]} versions behind" for key in found}
    plot = line_plot(run, lines, "nats a token", log=True)
    return Figure(
        "staleness",
        "What staleness does to the ratio",
        "KL from the weights that sampled a token to those that train on it (k3), apart by its lag. At lag 0 it is the "
        "engines' mismatch alone.",
        "It grows with the lag, and not over the steps.",
        "Above 0.1: the correction cuts much of the batch (objective.correction), and updates teach little. Lower the "
        "learning rate or rollout.max_staleness.",
        "",
        plot,
        "" if lines else "No step has stale tokens.",
    )


def idle(run: Run) -> Figure:
    lines = {"idle/trainer": "trainer waits", "idle/servers": "servers have no request"}
    plot = line_plot(run, lines, "share of the time", percent=True)
    return Figure(
        "idle",
        "Who waits",
        "The trainer for groups or for answers in flight before a transfer; servers for prompts, a mean over them.",
        "One of the two is near 0: the other has too many GPUs, or all have enough.",
        "Both well above 0: rollout.ahead is too small, or transfers wait for long answers (rollout.interrupt).",
        ends(present(run, "idle/trainer")[1], "{:.0%} of the trainer's time"),
        plot,
        absent(run, *lines),
    )


def lengths(run: Run) -> Figure:
    lines = {"response/length_mean": "trained on", "rollout/open_length_mean": "still open, so far"}
    plot = line_plot(run, lines, "tokens")
    return Figure(
        "open_lengths",
        "Lengths taken and open",
        "Tokens of the answers that a step trains on, beside those of groups that are not finished.",
        "Both settle after some steps.",
        "Answers that are trained on stay much shorter than the open ones for long: short ones finish first. With "
        "rollout.order=admission they are taken in the order of the prompts.",
        "",
        plot,
        absent(run, *lines),
    )
