"""The figure of docs/language.md: reward by step and held-out accuracy before and after, a colour a run.

    .venv/bin/python scripts/language_figure.py runs/language-0 runs/language-1 [--out docs/figures]

A line is the mean of three steps, a dot a step. Held-out accuracy has its interval of 95%.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#4d4d4d")
WIDTH = 3  # steps of a mean


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def draw(runs: list[Path], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    for place, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        rewards = np.array([row["reward/mean"] for row in rows(run / "metrics.jsonl")])
        steps = np.arange(1, len(rewards) + 1)
        left.plot(steps, rewards, "o", color=colour, markersize=3, alpha=0.5)
        means = [rewards[n : n + WIDTH].mean() for n in range(len(rewards) - WIDTH + 1)]
        left.plot(np.arange(len(means)) + 1 + WIDTH // 2, means, color=colour, label=run.name)
        for at, evaluation in enumerate(rows(run / "evaluations.jsonl")):
            mean, low, high = evaluation["scores"]["reward"]
            x = at + 0.2 * (place - (len(runs) - 1) / 2)
            right.errorbar([x], [mean], [[mean - low], [high - mean]], fmt="o", color=colour, capsize=4)
    left.set_xlabel("step")
    left.set_ylabel("reward of training sums")
    left.legend(fontsize=8)
    right.set_xticks([0, 1], ["before", "after"])
    right.set_xlim(-0.5, 1.5)
    right.set_ylabel("held-out sums that are right")
    for axis in (left, right):
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "language.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    draw(options.runs, options.out)


if __name__ == "__main__":
    main()
