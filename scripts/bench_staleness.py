"""What staleness does to the reward: the quickstart's run for each bound, correction and seed, one after another.

    .venv/bin/python scripts/bench_staleness.py OUT [--staleness 0 1 4] [--corrections geometric_tis token_tis none]
                                                [--seeds 0 1 2] [section.field=value ...]

geometric_tis and none are the quickstart's GSPO; token_tis weighs tokens, so that its ratios are of tokens too (GRPO).
Each run keeps its directory, OUT/staleness_1_token_tis_seed_0, and a run that is there whole is not made again: the
same command goes on where it was stopped. Without staleness `none` is left out.
Prints the mean reward of the first and the last steps, over seeds, and the last of each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from pipeline.config import load_config
from pipeline.loop.run import train

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = {
    "geometric_tis": ["objective.correction={kind: geometric_tis, high: 2.0}"],
    "token_tis": ["objective={preset: grpo, correction: {kind: token_tis, high: 2.0}}"],
    "none": ["objective.correction=none"],
}
COLUMNS = ("lag", "first {}", "last {}", "last {}, of each seed")
EDGE = 5  # steps at either end


def rows_of(out: Path, staleness: int, correction: str, seed: int, overrides: list[str]) -> list[dict]:
    """Metrics of a run, a step each; it is made where it is not there whole."""
    directory = out / f"staleness_{staleness}_{correction}_seed_{seed}"
    settings = [f"run.directory={directory}", f"run.seed={seed}", f"rollout.max_staleness={staleness}", *overrides]
    config = load_config(CONFIG, [*settings, *SETTINGS[correction]])
    file = directory / "metrics.jsonl"
    if not file.exists() or len(file.read_text().splitlines()) < config.train.steps:
        train(config)
    return [json.loads(line) for line in file.read_text().splitlines()]


def reward(rows: list[dict]) -> float:
    return statistics.fmean(row["reward/mean"] for row in rows)


def row_of(runs: list[list[dict]]) -> list[str]:
    """Cells of one row, of a run for each seed."""
    last = [reward(rows[-EDGE:]) for rows in runs]
    lag = statistics.fmean(row.get("rollout/lag_mean", 0.0) for rows in runs for row in rows)
    first = statistics.fmean(reward(rows[:EDGE]) for rows in runs)
    cells = [f"{lag:.1f}", f"{first:.3f}", f"{statistics.fmean(last):.3f}"]
    return [*cells, ", ".join(f"{value:.3f}" for value in last)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--corrections", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    table = []
    for staleness in options.staleness:
        for correction in options.corrections:
            if not staleness and correction == "none":
                continue
            runs = [rows_of(options.out, staleness, correction, seed, options.overrides) for seed in options.seeds]
            table.append(f"| {staleness} | {correction} | {' | '.join(row_of(runs))} |")
    titles = ["max_staleness", "correction", *(title.format(EDGE) for title in COLUMNS)]
    print("\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *table]))


if __name__ == "__main__":
    main()
