"""What replay does for a real language model with rounded rollouts: mismatch and reward, with `make language`'s preset.

    make language-model
    .venv/bin/python -m scripts.language_replay OUT [section.field=value ...] [--rounding int8 fp8]
                                                [--replay none r2 r3] [--seeds 0 1 2] [--steps 16]

The server's matrices of attention and experts are rounded on their way (`precision.rollout_weights`), so that it is
another policy than the trainer's and its routers choose other experts. Each run has its directory,
OUT/int8_r3_seed_0, and is kept beside it (`kept_runs.py`): what is there is not made again, so the same command goes
on where it was stopped. Seeds come first: a table that was stopped has whole rows of fewer seeds. Printed are means
over steps and seeds, and the mean reward of the first and the last steps, five of each or half of a run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

from scripts.kept_runs import EDGE, KeptRun, keep_training, look, print_table

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2-moe" / "arithmetic.yaml"
SETTINGS = ["evaluate=[]", "rollout.prompts_per_step=4", "checks.first_rollouts=0", "checks.probe_every=0"]
MISMATCH = ("mismatch/abs_logprob", "mismatch/k3", "mismatch/max_abs_logprob")


def settings_of(rounding: str, replay: str, seed: int, steps: int, overrides: list[str]) -> list[str]:
    own = [f"precision.rollout_weights={rounding}", f"replay={replay}", f"run.seed={seed}", f"train.steps={steps}"]
    return [*SETTINGS, *own, *overrides]


def row_of(runs: list[KeptRun], edge: int) -> list[str]:
    """Cells of one row, of a run for each seed; means are of those that are whole. edge: steps of either end."""
    whole = [run for run in runs if run.broken is None]
    each = ", ".join("broken" if run.broken else f"{run.last(edge):.3f}" for run in runs)
    if not whole:
        return ["", "", "", "", "", each]
    gap, k3 = (statistics.fmean(run.mean(key) for run in whole) for key in MISMATCH[:2])
    largest = max(run.largest(MISMATCH[2]) for run in whole)
    first, last = (
        statistics.fmean(values) for values in zip(*((r.first(edge), r.last(edge)) for r in whole), strict=True)
    )
    return [f"{gap:.1e}", f"{k3:.1e}", f"{largest:.2f}", f"{first:.3f}", f"{last:.3f}", each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounding", nargs="+", choices=("same", "int8", "fp8"), default=["int8", "fp8"])
    parser.add_argument("--replay", nargs="+", choices=("none", "r2", "r3"), default=["none", "r2", "r3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--print", action="store_true", help="only what is there; nothing is made")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    found: dict[tuple[str, str], list[KeptRun]] = {}
    for seed, rounding, replay in itertools.product(options.seeds, options.rounding, options.replay):
        settings = settings_of(rounding, replay, seed, options.steps, options.overrides)
        name = f"{rounding}_{replay}_seed_{seed}"
        run = (
            look(options.out / f"{name}.json", settings)
            if options.print
            else keep_training(options.out / name, CONFIG, settings)
        )
        found.setdefault((rounding, replay), []).extend([run] if run else [])
    edge = max(1, min(EDGE, options.steps // 2))
    columns = ["mean |gap|", "k3", "largest gap", f"first {edge}", f"last {edge}", f"last {edge}, of each seed"]
    rows = [[*cell, *row_of(runs, edge)] for cell, runs in found.items() if runs]
    print_table(["rollouts", "replay", *columns], rows)


if __name__ == "__main__":
    main()
