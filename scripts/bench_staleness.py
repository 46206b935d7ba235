"""What staleness does to the reward: the quickstart's run for each bound, correction and seed, one after another.

    .venv/bin/python -m scripts.bench_staleness OUT [section.field=value ...] [--staleness 0 1 4] [--seeds 0 1 2]
                                                [--corrections geometric_tis token_tis none]

geometric_tis and none are the quickstart's GSPO; token_tis weighs tokens, so that its ratios are of tokens too (GRPO).
Each run has its directory, OUT/staleness_1_token_tis_seed_0, and is kept beside it (`kept_runs.py`): what is there is
not made again, so the same command goes on where it was stopped. Without staleness `none` is left out.
Prints the mean reward of the first and the last steps, over seeds, and the last of each seed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from scripts.kept_runs import EDGE, KeptRun, keep_training, print_table

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = {
    "geometric_tis": ["objective.correction={kind: geometric_tis, high: 2.0}"],
    "token_tis": ["objective={preset: grpo, correction: {kind: token_tis, high: 2.0}}"],
    "none": ["objective.correction=none"],
}
COLUMNS = ("lag", f"first {EDGE}", f"last {EDGE}", f"last {EDGE}, of each seed")


def run_of(out: Path, staleness: int, correction: str, seed: int, overrides: list[str]) -> KeptRun:
    """One run; it is made where it is not there."""
    directory = out / f"staleness_{staleness}_{correction}_seed_{seed}"
    own = [f"run.seed={seed}", f"rollout.max_staleness={staleness}", *overrides, *SETTINGS[correction]]
    return keep_training(directory, CONFIG, own)


def row_of(runs: list[KeptRun]) -> list[str]:
    """Cells of one row, of a run for each seed; means are of those that are whole."""
    whole = [run for run in runs if run.broken is None]
    each = ", ".join("broken" if run.broken else f"{run.last():.3f}" for run in runs)
    if not whole:
        return ["", "", "", each]
    lag = statistics.fmean(row.get("rollout/lag_mean", 0.0) for run in whole for row in run.rows)
    first, last = (statistics.fmean(values) for values in zip(*((r.first(), r.last()) for r in whole), strict=True))
    return [f"{lag:.1f}", f"{first:.3f}", f"{last:.3f}", each]


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
            runs = [run_of(options.out, staleness, correction, seed, options.overrides) for seed in options.seeds]
            table.append([str(staleness), correction, *row_of(runs)])
    print_table(["max_staleness", "correction", *COLUMNS], table)


if __name__ == "__main__":
    main()
