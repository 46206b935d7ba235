"""The page: figures, rollouts and links of a run in one HTML file that needs no network."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.parse import quote

from pipeline.observe.report import ahead, learning, policies, scores, slowest, speed
from pipeline.observe.report.figure import Figure, present
from pipeline.observe.report.html import Tile, render_page
from pipeline.observe.report.rollouts import LEVELS, SMALLEST_DECADE, SURPRISE, shown_steps
from pipeline.observe.report.run_files import Run, read_run
from pipeline.text.yaml_text import dump

_FILES = (
    ("config.yaml", "the configuration, every default written out"),
    ("metrics.jsonl", "all numbers, a line a step"),
    ("records.jsonl", "routing by layer and histograms, a line a step"),
    ("rollouts", "answers of every step, readable"),
    ("evaluations.jsonl", "scores of the evaluations, a line each"),
    ("evaluations", "questions and answers of the evaluations"),
    ("diagnose.html", "how far the engines were apart before the first step, and why"),
    ("diagnose.json", "how far the engines were apart before the first step"),
    ("facts.json", "hosts, GPUs, versions, commit, where each trainer rank was"),
    ("alerts.jsonl", "alerts that fired or were resolved, a line each"),
    ("logs", "of both engines, a file a process"),
    ("tensorboard", "the numbers for TensorBoard"),
    ("dumps", "what the steps trained on, for sameroute train --from-dump"),
    ("stalls", "where every process was when the run stood still"),
    ("profiles", "traces of steps, for ui.perfetto.dev"),
    ("hf", "the trained model"),
    ("summary.png", "reward, mismatch and length in one picture"),
)
_SETTINGS = (
    ("model", ("model", "path")),
    ("layers", ("model", "tiny", "layers")),
    ("experts", ("model", "tiny", "experts")),
    ("task", ("data", "task", "name")),
    ("data", ("data", "path")),
    ("objective", ("objective", "preset")),
    ("route replay", ("replay",)),
    ("prompts a step", ("rollout", "prompts_per_step")),
    ("answers a prompt", ("rollout", "samples_per_prompt")),
    ("mini-batches", ("train", "mini_batches")),
    ("learning rate", ("train", "lr")),
    ("trainer ranks", ("parallel", "ranks")),
    ("number format", ("precision", "weights")),
    ("seed", ("run", "seed")),
)


def write_report(path: str | Path) -> Path:
    """Write report.html into a run directory; returns its path. The run may still be going on.

    Raises ReportError where the path is no run directory, or holds rollouts that cannot be read.
    """
    run = read_run(path)
    target = run.path / "report.html"
    partial = target.with_suffix(".partial")
    partial.write_text(render(run), encoding="utf-8")
    os.replace(partial, target)
    return target


def sections(run: Run) -> list[tuple[str, list[Figure]]]:
    """All figures, under the question that they answer."""
    return [
        (
            "Does it learn?",
            [
                *scores.evaluations(run),
                learning.reward(run),
                *scores.components(run),
                learning.length(run),
                learning.entropy(run),
                learning.wasted(run),
                *([learning.teacher(run)] if run.has("teacher/kl") else []),
                scores.pass_rates(run),
                *scores.failures(run),
            ],
        ),
        (
            "Do trainer and rollout engine hold the same model?",
            [policies.mismatch(run), policies.agreement(run), *policies.ratios(run, "proximal/rollout")],
        ),
        (
            "How far does an update go?",
            [policies.clipped(run), learning.grad_norm(run), *policies.ratios(run, "current/proximal")],
        ),
        *([("How far do rollouts run ahead?", ahead.figures(run))] if run.has("rollout/lag_mean") else []),
        ("Where does the time go?", [speed.time(run), speed.throughput(run), *speed.idle(run), *slowest.figures(run)]),
    ]


def render(run: Run) -> str:
    """The page as text."""
    shown = sections(run)
    return render_page(
        Path(__file__).with_name("page.html"),
        [figure for _, figures in shown for figure in figures],
        name=run.path.resolve().name,
        state=state(run),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        tiles=tiles(run),
        settings=[(label, value) for label, keys in _SETTINGS if (value := run.setting(*keys)) is not None],
        config=dump(dict(run.config)),
        notes=run.notes,
        sections=shown,
        rollouts=shown_steps(run),
        levels=range(-LEVELS, LEVELS + 1),
        smallest_decade=SMALLEST_DECADE,
        surprise=SURPRISE,
        files=links(run.path),
    )


def state(run: Run) -> str:
    """How far the run is, in a sentence."""
    done = len(run.metrics)
    of = f" of {run.planned}" if run.planned is not None else ""
    if run.finished:
        return f"Finished: {done}{of} steps."
    if not done:
        return "No step is recorded yet."
    age = max(time.time() - (run.path / "metrics.jsonl").stat().st_mtime, 0.0)
    return (
        f"Not finished: {done}{of} steps, the last recorded {_duration(age)} before this report. Run the command again "
        "for a newer one."
    )


def tiles(run: Run) -> list[Tile]:
    """What to look at first; without the numbers that a run does not have."""

    def last(label: str, key: str, form: str, note: str) -> list[Tile]:
        _, values = present(run, key)
        return [Tile(label, form.format(values[-1]), note)] if len(values) else []

    return [
        *last("reward", "reward/mean", "{:.3f}", "mean of the last step"),
        *last("mismatch", "mismatch/abs_logprob", "{:.1e}", "nats a token, trainer to server, last step"),
        *last("routes replayed", "routing/replayed_fraction", "{:.1%}", "of the tokens, last step"),
        *last("clipped", "loss/clip_fraction", "{:.1%}", "of the ratios, last step"),
        *last("entropy", "policy/entropy", "{:.3g}", "nats a token, last step"),
        *last("step time", "time/step_s", "{:.3g} s", "last step"),
    ]


def links(path: Path) -> list[tuple[str, str, str]]:
    """(relative link, name, what it is) of what the run has written."""
    found = []
    for name, what in _FILES:
        file = path / name
        if file.is_dir() and any(file.iterdir()):
            found.append((f"{quote(name)}/", f"{name}/", what))
        elif file.is_file():
            found.append((quote(name), name, what))
    return found


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
