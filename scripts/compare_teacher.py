"""How fast the quickstart's model learns from rewards, from a larger model, and from both: a run for each, by seed.

    .venv/bin/python -m scripts.compare_teacher OUT [section.field=value ...] [--seeds 0 1 2] [--figure docs/figures]
                                                [--ways rewards teacher both] [--table]

The teacher is made first, OUT/teacher, by configs/distillation/teacher.yaml. The runs of a seed begin with the same
supervised policy and make as many steps of as many answers; all are configs/distillation/student.yaml but for what
WAYS says. Accuracy is that of held-out questions, seconds are those of the steps, without engines that start,
supervised steps and evaluations. Each run is kept in OUT (`kept_runs.py`), so the same command goes on where it was
stopped; --table prints what is there and starts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.hf.writer import has_weights
from pipeline.config import load_config
from pipeline.loop.run import train
from scripts.kept_runs import KeptRun, keep, look, print_table

CONFIGS = Path(__file__).parent.parent / "configs" / "distillation"
SCORE = "eval/held-out/reward"
GROUPS = ["rollout.prompts_per_step=32", "rollout.samples_per_prompt=8",
          "objective.correction={kind: geometric_tis, high: 2.0}"]  # fmt: skip
WAYS = {
    "rewards": [
        "teacher=null",
        "objective.distillation=null",
        *GROUPS,
        "train.lr=5e-4",
        "train.mini_batches=2",
        "train.decay_steps=48",
    ],
    "teacher": [],
    "both": ["objective.distillation.reward=1.0", *GROUPS, "train.lr=1e-3"],
}
"""Groups, correction and learning rate of rewards are the quickstart's."""
REACHED = (0.5, 0.8, 0.9)
COLOURS = {"rewards": "#4d4d4d", "teacher": "#d1495b", "both": "#1b6ca8"}


def settings_of(way: str, seed: int, out: Path, overrides: Sequence[str]) -> list[str]:
    teacher = [] if way == "rewards" else [f"teacher.path={out / 'teacher'}"]
    return [*WAYS[way], *teacher, f"run.seed={seed}", *overrides]


def make_teacher(out: Path) -> None:
    """Where it is not there."""
    if not has_weights(out / "teacher" / "hf"):
        train(load_config(CONFIGS / "teacher.yaml", [f"run.directory={out / 'teacher'}"]))


def steps(directory: Path, settings: Sequence[str]) -> Iterator[dict[str, float]]:
    """Metrics of one run, a step each; before them, as step 0, the accuracy that it began with."""
    train(load_config(CONFIGS / "student.yaml", [*settings, f"run.directory={directory}"]))
    first, *_ = map(json.loads, (directory / "evaluations.jsonl").read_text().splitlines())
    yield {"step": 0, SCORE: first["scores"]["reward"][0]}
    yield from map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())


def curve(run: KeptRun) -> list[tuple[int, float, float]]:
    """(steps, seconds of them, accuracy) after each evaluation."""
    seconds = itertools.accumulate(row.get("time/step_s", 0.0) for row in run.rows)
    return [(int(row["step"]), s, row[SCORE]) for row, s in zip(run.rows, seconds, strict=True) if SCORE in row]


def reached(run: KeptRun, accuracy: float) -> tuple[int, float] | None:
    """Steps and seconds after which an evaluation was first that good; None: none was."""
    return next(((step, seconds) for step, seconds, score in curve(run) if score >= accuracy), None)


def row_of(way: str, runs: Sequence[KeptRun]) -> list[str]:
    """Cells of a row of the table, of a run for each seed; figures are of those that are whole."""
    whole = [run for run in runs if run.broken is None]
    each = ", ".join("broken" if run.broken else f"{curve(run)[-1][2]:.3f}" for run in runs)
    if not whole:
        return [way, "", "", each, *[""] * len(REACHED), ""]
    first, last = (statistics.fmean(curve(run)[place][2] for run in whole) for place in (0, -1))
    step_s = statistics.fmean(run.mean("time/step_s") for run in whole)
    return [way, f"{first:.3f}", f"{last:.3f}", each, *(_when(whole, a) for a in REACHED), f"{step_s:.2f}"]


def _when(runs: Sequence[KeptRun], accuracy: float) -> str:
    found = [reached(run, accuracy) for run in runs]
    there = [each for each in found if each is not None]
    if not there:
        return "never"
    steps_, seconds = (statistics.fmean(values) for values in zip(*there, strict=True))
    some = "" if len(there) == len(runs) else f" ({len(there)} of {len(runs)})"
    return f"{steps_:.0f} steps, {seconds:.0f} s{some}"


def table(kept: dict[str, dict[int, KeptRun]]) -> None:
    last = max((int(run.rows[-1]["step"]) for runs in kept.values() for run in runs.values() if run.rows), default=0)
    titles = ["learns from", "accuracy before", f"after {last} steps", "of each seed"]
    titles += [*(f"reaches {accuracy:g}" for accuracy in REACHED), "seconds a step"]
    print_table(titles, [row_of(way, list(runs.values())) for way, runs in kept.items() if runs])
    for way, runs in kept.items():
        for seed, run in runs.items():
            if run.broken:
                print(f"{way}, seed {seed}: broken after {len(run.rows)} steps: {run.broken}")


def draw(kept: dict[str, dict[int, KeptRun]], path: Path) -> None:
    """Accuracy against steps, and against seconds; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for (way, runs), place in itertools.product(kept.items(), (0, 1)):
        for number, run in enumerate(run for run in runs.values() if run.broken is None):
            points = curve(run)
            label = way if number == 0 else None
            axes[place].plot([p[place] for p in points], [p[2] for p in points], color=COLOURS[way], label=label)
    axes[0].set_ylabel("accuracy, held-out questions")
    axes[0].legend(title="learns from", fontsize=8)
    for axis, title in zip(axes, ("steps", "seconds of steps"), strict=True):
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path / "compare_teacher.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--figure", type=Path, help="folder for compare_teacher.png")
    parser.add_argument("--table", action="store_true", help="make no run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    if not options.table:
        make_teacher(options.out)
    kept: dict[str, dict[int, KeptRun]] = {way: {} for way in options.ways}
    for seed, way in itertools.product(options.seeds, options.ways):
        directory, settings = options.out / f"{way}_seed_{seed}", settings_of(way, seed, options.out, options.overrides)
        file, began = options.out / f"{directory.name}.json", time.perf_counter()
        if options.table:
            run = look(file, settings)
        else:
            run = keep(file, settings, lambda d=directory, s=settings: steps(d, s))
        if run is not None:
            kept[way][seed] = run
            said = run.broken or f"{curve(run)[-1][2]:.3f}"
            print(f"{directory.name}: {said} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    table(kept)
    if options.figure is not None:
        draw(kept, options.figure)


if __name__ == "__main__":
    main()
