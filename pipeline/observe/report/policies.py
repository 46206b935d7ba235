"""Figures of how far the three policies are apart: the server's, the trainer's at the start of a step, the updated."""

from __future__ import annotations

import numpy as np

from pipeline.config.tree import LOGPROB_BOUNDS
from pipeline.observe.report.figure import Figure, absent, ends, line_plot, present
from pipeline.observe.report.ratio_figures import draw_ratio_by_step, draw_ratio_of_steps, ratio_of
from pipeline.observe.report.run_files import Run
from pipeline.observe.report.theme import BOUND, blank, thinned


def mismatch(run: Run) -> Figure:
    lines = {
        "mismatch/abs_logprob": "mean |difference|",
        "mismatch/p99": "99th percentile",
        "mismatch/max_abs_logprob": "largest",
        "mismatch/k3": "k3, estimates the KL divergence",
    }
    plot = line_plot(run, lines, "nats a token", log=True)
    dtype = run.setting("trainer", "dtype")
    bound = run.setting("checks", "max_abs_logprob") or LOGPROB_BOUNDS.get(str(dtype))
    if plot is not None and isinstance(bound, int | float) and bound > 0:
        ends = run.steps[[0, -1]]
        plot.add_scatter(
            x=ends, y=[bound, bound], name="a mean above stops the run", mode="lines", line=BOUND, hoverinfo="skip"
        )
    largest = present(run, "mismatch/max_abs_logprob")[1]
    return Figure(
        "mismatch",
        "Mismatch of the engines",
        "How far the trainer's log-probs are from those of the server that sampled, on the same tokens and weights. "
        "Every policy gradient takes this for zero.",
        "Flat, and as small as the number format allows: 1e-7 to 1e-5 in float32, about 1e-2 in bfloat16.",
        "It grows with the steps, or jumps at one: a weight transfer failed, or the engines route, mask or scale "
        "differently. Training on it ends in collapse.",
        f"Largest of all steps: {largest.max():.2g} nats." if len(largest) else "",
        plot,
        absent(run, *lines),
    )


def agreement(run: Run) -> Figure:
    routed = [(step, np.array(r["routing"], np.float64)) for step, r in run.records.items() if r.get("routing")]
    routed = [(step, counts) for step, counts in routed if counts.ndim == 2 and counts.shape[1] >= 3]
    caption = "Share of tokens for which the trainer's own router would have chosen the same experts as the server did."
    good = "1 everywhere but for rare ties: replay then changes nothing."
    bad = "One dark layer: that layer computes something else. Dark from some step on: look at mismatch there."
    title = "Routing agreement by layer"
    if not routed:
        missing = (
            "There are no routes to compare: the model is dense, or replay is none."
            if run.records
            else "No step has written records.jsonl yet."
        )
        return Figure("agreement", title, caption, good, bad, missing=missing)
    layers = max(len(counts) for _, counts in routed)
    shown, every = thinned(routed)
    z = np.full((layers, len(shown)), np.nan)
    for k, (_, counts) in enumerate(shown):
        with np.errstate(invalid="ignore"):
            z[: len(counts), k] = counts[:, 1] / counts[:, 0]  # 0 / 0 where nothing was replayed
    replayed, agreed, fallen = (sum(float(counts[:, i].sum()) for _, counts in routed) for i in range(3))
    plot = blank("layer")
    gap = int(len(shown) <= 60 and layers <= 16)  # between cells, pixels
    low = float(np.nanmin(z)) if np.isfinite(z).any() else 1.0
    plot.add_heatmap(
        x=[step for step, _ in shown],
        y=list(range(layers)),
        z=z,
        zmin=min(low, 0.9),
        zmax=1.0,
        xgap=gap,
        ygap=gap,
        hovertemplate="step %{x}, layer %{y}: %{z:.3%}<extra></extra>",
        colorbar={"tickformat": ".1%", "thickness": 12},
    )
    plot.update_layout(hovermode="closest")
    plot.update_yaxes(dtick=1 if layers <= 12 else None, autorange="reversed", showgrid=False)
    plot.update_xaxes(showgrid=False)
    now = f"{agreed / replayed:.2%} agreed over all steps. " if replayed else "No token was replayed. "
    share = fallen / max(replayed + fallen, 1)
    now += (
        f"{share:.2%} of the routes were missing; those tokens routed natively." if fallen else "No route was missing."
    )
    return Figure("agreement", title, caption + every, good, bad, now, plot)


def clipped(run: Run) -> Figure:
    corrections = sorted(
        {key for row in run.metrics for key in row if key.startswith("correction/") and key.endswith("_cut")}
    )
    lines = {"loss/clip_fraction": "clipped by the surrogate"}
    lines |= {key: f"cut by {key.removeprefix('correction/').removesuffix('_cut')}" for key in corrections}
    values = present(run, "loss/clip_fraction")[1]
    return Figure(
        "clipped",
        "Clip fractions",
        "Share of the ratios (of tokens, or of sequences, as the objective has it) that the update bounded: by the "
        "surrogate's clip on current/proximal, and by the correction on proximal/rollout.",
        "Some per cent for clips on tokens, up to a fifth for clips on sequences; corrections near 0.",
        "More and more: the learning rate is too high, or too many updates are made on the rollouts of a step. A "
        "correction that cuts at all in float32 points to a mismatch.",
        ends(values, "{:.1%}"),
        line_plot(run, lines, "share", percent=True),
        absent(run, "loss/clip_fraction"),
    )


def ratios(run: Run, name: str) -> tuple[Figure, Figure]:
    """The histogram of some steps, and of all steps as a heat map."""
    of_engines = name == "proximal/rollout"
    title = "Ratio of trainer to server" if of_engines else "Ratio of updated to proximal policy"
    known = {step: ratio for step, record in run.records.items() if (ratio := ratio_of(record, name)) is not None}
    level = next(iter(known.values())).level if known else "token"
    caption = (
        "Log-ratio of the probabilities that trainer and server give a sampled token, at the same weights. Each mark "
        "is ten times the one before, on either side of 0."
        if of_engines
        else f"Log-ratio of the policy that is being updated to the one that the step began with, by {level}, as each "
        "mini-batch began; the first one of a step begins at 0. Dotted: where the surrogate clips."
    )
    good = "Narrow, and alike on both sides." if of_engines else "Most of it inside the dotted lines, in every step."
    bad = (
        "It leans to one side, or has a far tail: some tokens are computed differently."
        if of_engines
        else "Much of it at or beyond the lines: the update throws that part of the rollouts away."
    )
    missing = "" if known else "No step has written records.jsonl yet."
    if known and not of_engines and not any(ratio.moved for ratio in known.values()):
        known = {}
        missing = (
            "The ratio is 1 everywhere: with one mini-batch a step the update begins with the very policy that it is "
            "compared with, so that there is nothing to clip. train.mini_batches sets how many there are."
        )
    nonfinite = sum(ratio.nonfinite for ratio in known.values())
    now = f"{nonfinite:g} log-ratios were not finite, and are not drawn." if nonfinite else ""
    file_name = name.replace("/", "_")
    of_steps = draw_ratio_of_steps(known) if known else None
    by_step, every = draw_ratio_by_step(known) if known else (None, "")
    return (
        Figure(f"{file_name}_histogram", title, caption, good, bad, now, of_steps, missing),
        Figure(
            f"{file_name}_by_step",
            f"{title}, all steps",
            "The same histogram, a column a step; the brighter, the larger the share (ten times from mark to mark)."
            + every,
            "The band keeps its width.",
            "It widens or drifts with the steps.",
            "",
            by_step,
            missing,
        ),
    )
