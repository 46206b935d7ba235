"""Figures of what the policy learns."""

from __future__ import annotations

import numpy as np

from pipeline.observe.report.figure import WINDOW, Figure, absent, ends, line_plot, mode, present
from pipeline.observe.report.run_files import Run
from pipeline.observe.report.theme import blank
from pipeline.observe.summary import running_mean


def reward(run: Run) -> Figure:
    steps, values = present(run, "reward/mean")
    plot = None
    if len(steps):
        plot = blank("reward")
        plot.add_scatter(x=steps, y=values, name="each step", mode=mode(steps), line={"width": 1}, opacity=0.5)
        mean = running_mean(values, WINDOW)
        plot.add_scatter(x=steps, y=mean, name=f"mean of {WINDOW} steps", line={"width": 2.5})
        if values.min() >= 0 and values.max() <= 1:
            plot.update_yaxes(range=[-0.03, 1.03])
    return Figure(
        "reward",
        "Reward",
        "Mean reward of a step's rollouts, as the verifier gave it.",
        "It rises, and then stays.",
        "Flat at its lowest from the start: no answer is ever right, so there is nothing to reinforce. A fall after a "
        "rise: look at mismatch and entropy at that step.",
        ends(values, "{:.3f}"),
        plot,
        absent(run, "reward/mean"),
    )


def length(run: Run) -> Figure:
    lines = {"response/length_mean": "mean", "response/length_max": "longest"}
    plot = line_plot(run, lines, "tokens")
    if plot is not None:
        plot.update_yaxes(rangemode="tozero")
    return Figure(
        "length",
        "Response length",
        "Tokens of an answer, its stop token included.",
        "It moves slowly, and the longest stays below the limit (rollout.max_new_tokens).",
        "The mean runs into the limit: answers are cut before they end, and earn nothing. A sudden collapse: a short "
        "answer is rewarded.",
        ends(present(run, "response/length_mean")[1], "{:.1f} tokens"),
        plot,
        absent(run, *lines),
    )


def entropy(run: Run) -> Figure:
    plot = line_plot(run, {"policy/entropy": "entropy"}, "nats a token")
    if plot is not None:
        plot.update_yaxes(rangemode="tozero")
    return Figure(
        "entropy",
        "Entropy",
        "How undecided the policy is about the next token, on average over the sampled ones.",
        "A slow decline while the reward rises.",
        "Close to 0 early on: it samples the same answers again and again, and stops exploring. A steep rise: it falls "
        "apart.",
        ends(present(run, "policy/entropy")[1], "{:.3g} nats"),
        plot,
        absent(run, "policy/entropy"),
    )


def wasted(run: Run) -> Figure:
    lines = {
        "reward/uninformative_groups": "prompts whose answers all have one reward",
        "response/truncated_fraction": "answers cut at the limit",
    }
    return Figure(
        "wasted",
        "Rollouts that teach nothing",
        "A prompt whose answers are all rewarded alike has no advantage to learn from.",
        "Low, or rising only because the task is solved.",
        "Near 100% with a low reward: the prompts are too hard. Near 100% with a high one: they are too easy.",
        ends(present(run, "reward/uninformative_groups")[1], "{:.0%} of the prompts"),
        line_plot(run, lines, "share", percent=True),
        absent(run, *lines),
    )


def teacher(run: Run) -> Figure:
    lines = {"teacher/kl": "of the sampled tokens", "teacher/kl_top": "over the teacher's likeliest tokens"}
    return Figure(
        "teacher",
        "Distance from the teacher",
        "Reverse KL of the policy to its teacher, on what the policy sampled.",
        "It falls towards 0, fast at first.",
        "It stays where it began: the teacher's part is too small beside the rewards' (objective.distillation), or the "
        "teacher finds nothing likely of what this policy says. Below 0 for long: the policy is no longer the one that "
        "sampled.",
        ends(present(run, "teacher/kl")[1], "{:.3g} nats a token"),
        line_plot(run, lines, "nats a token"),
        absent(run, "teacher/kl"),
    )


def grad_norm(run: Run) -> Figure:
    skipped = float(np.nansum(run.column("train/skipped_updates"))) if run.has("train/skipped_updates") else 0.0
    note = f" Updates were skipped, because a gradient was not finite, in {skipped:g} steps." if skipped else ""
    now = ends(present(run, "train/grad_norm")[1], "{:.3g}")
    return Figure(
        "grad_norm",
        "Gradient norm",
        "Before it is clipped to train.clip_grad; the mean over a step's mini-batches.",
        "Of one order of magnitude all along.",
        "Spikes: single rollouts with an extreme ratio. Exactly 0: no group had two different rewards.",
        now + note,
        line_plot(run, {"train/grad_norm": "gradient norm"}, "norm", log=True),
        absent(run, "train/grad_norm"),
    )
