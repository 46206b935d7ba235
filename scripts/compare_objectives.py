"""What objectives, staleness and replay do to the reward under int8 rollouts: a run for each, by seed, in real engines.

    .venv/bin/python -m scripts.compare_objectives OUT [section.field=value ...] [--seeds 0 1 2] [--figure docs/figures]
                                                   [--objectives gspo minirl] [--staleness 0 4] [--table]

Five objectives at three bounds of staleness under R3, and two of them with R2 and without replay at the least and the
largest bound. The server gets every linear layer of attention and experts rounded to int8, so mu is another policy than
pi_o at the same weights. Learning rate and batches are the same for all. The runs of a seed share their engines, their
supervised start and their prompts; each begins with new moments. Each is kept in OUT (`kept_runs.py`), so the same
command goes on where it was stopped; --table prints what is there and starts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray

from pipeline.config import load_config
from pipeline.data.prompts import PromptSource
from pipeline.loop.asynchronous import asynchronous
from pipeline.loop.loop import Loop
from pipeline.loop.open_loop import open_loop
from scripts.kept_runs import KeptRun, keep, look, print_table

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SEQUENCES = "clip_low: 0.02, clip_high: 0.03, correction: {kind: geometric_tis, high: 2.0}"
OBJECTIVES = {
    "gspo": f"{{preset: gspo, {SEQUENCES}}}",
    "dr_gspo": f"{{preset: dr_gspo, {SEQUENCES}}}",
    "minirl": "{preset: minirl}",
    "cispo": "{preset: cispo, correction: {kind: token_tis, high: 2.0}}",
    "dppo_tv": "{preset: dppo_tv}",
}
"""Clip and correction of sequences are the quickstart's. minirl and dppo_tv hold mu in their own ratio."""
WITH_REPLAYS, REPLAYED_AT = ("gspo", "minirl"), (0, 4)
STEPS, EDGE = 50, 10
SETTINGS = [f"train.steps={STEPS}", f"train.decay_steps={2 * STEPS}", "rollout.prompts_per_step=16",
            "precision.rollout_weights=int8", "checks.probe_every=0"]  # fmt: skip
COLOURS = dict(zip(OBJECTIVES, ("#1b6ca8", "#7fb2d6", "#d1495b", "#edae49", "#4d4d4d"), strict=True))


@dataclass(frozen=True)
class Cell:
    objective: str
    staleness: int
    replay: str

    def name(self, seed: int) -> str:
        return f"{self.objective}_{self.staleness}_{self.replay}_seed_{seed}"

    def settings(self, seed: int, overrides: Sequence[str]) -> list[str]:
        own = [f"objective={OBJECTIVES[self.objective]}", f"rollout.max_staleness={self.staleness}"]
        return [*SETTINGS, *own, f"replay={self.replay}", f"run.seed={seed}", *overrides]


def cells(objectives: Sequence[str], staleness: Sequence[int]) -> list[Cell]:
    """Of one seed, in their order."""
    chosen = [Cell(name, bound, "r3") for name in objectives for bound in staleness]
    ends = [bound for bound in REPLAYED_AT if bound in staleness]
    replayed = itertools.product([name for name in WITH_REPLAYS if name in objectives], ends, ("none", "r2"))
    return chosen + [Cell(*one) for one in replayed]


def _to_start(rank) -> None:
    """Runs in a trainer rank."""
    rank.trainer.policy.copy_from(rank.trainer.reference)


class Session:
    """The engines of one seed, started for the first run that is to be made, with the policy that each begins with."""

    def __init__(self, seed: int, overrides: Sequence[str]):
        self.seed, self.overrides = seed, overrides
        self._stack = contextlib.ExitStack()
        self._opened: tuple[Loop, Path] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened = None
        self._stack.close()

    def _open(self) -> tuple[Loop, Path]:
        # A KL in the configuration makes the trainer keep the supervised policy, to which every run goes back.
        asked = [*SETTINGS, f"run.seed={self.seed}", *self.overrides, "objective={preset: grpo, kl: {beta: 1.0}}"]
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "logs").mkdir()
        return self._stack.enter_context(open_loop(load_config(CONFIG, asked), folder, folder / "logs"))

    def steps(self, settings: Sequence[str]) -> Iterator[dict[str, float]]:
        """The metrics of one run, a step each. After an error the next run gets new engines."""
        try:
            self._opened = self._opened or self._open()
            session, model = self._opened
            config = load_config(CONFIG, list(settings))
            ray.get([rank.__ray_call__.remote(_to_start) for rank in session.trainers.ranks])
            session.trainers.restart_optimizer(config.train)
            source = PromptSource(config.data, model, seed=self.seed + 1, trust_remote_code=False)
            loop = replace(session, config=config, source=source)
            loop.sync()
            with asynchronous(loop, config.train.steps, None):
                for number in range(1, config.train.steps + 1):
                    yield loop.step(number).metrics
        except Exception:
            self.__exit__()
            raise


def row_of(cell: Cell, runs: Sequence[KeptRun]) -> list[str]:
    """Cells of a row of the table, of a run for each seed; figures are of those that are whole."""
    whole = [run for run in runs if run.broken is None]
    each = ", ".join("broken" if run.broken else f"{run.last(EDGE):.3f}" for run in runs)
    start = [cell.objective, str(cell.staleness), cell.replay]
    if not whole:
        return [*start, "", "", each, "", "", "", ""]
    last = [run.last(EDGE) for run in whole]
    spread = f" ± {statistics.stdev(last):.3f}" if len(last) > 1 else ""
    lag, clipped = (
        statistics.fmean(run.mean(key) for run in whole) for key in ("rollout/lag_mean", "loss/clip_fraction")
    )
    engines = statistics.fmean(run.mean("mismatch/k3") for run in whole)
    k3 = statistics.fmean(run.mean("staleness/k3") for run in whole) if cell.staleness else engines
    gap = max(run.largest("mismatch/max_abs_logprob", "staleness/max_abs_logprob") for run in whole)
    cells = [f"{lag:.1f}" if cell.staleness else "0", f"{statistics.fmean(last):.3f}{spread}", each]
    return [*start, *cells, f"{engines:.1e}", f"{k3:.1e}", f"{gap:.1f}", f"{clipped:.1%}"]


def table(kept: dict[Cell, dict[int, KeptRun]]) -> None:
    titles = ["objective", "max_staleness", "replay", "lag", f"reward, last {EDGE}", "of each seed"]
    titles += ["k3 of the engines", "k3 to mu", "largest gap to mu, nats", "clipped"]
    print_table(titles, [row_of(cell, list(runs.values())) for cell, runs in kept.items() if runs])
    for cell, runs in kept.items():
        for seed, run in runs.items():
            if run.broken:
                print(f"{cell.name(seed)}: broken after {len(run.rows)} steps: {run.broken}")


def draw(kept: dict[Cell, dict[int, KeptRun]], path: Path) -> None:
    """Reward of the last steps by staleness, and by replay; a dot a seed, a line or bar their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rewards = {c: [r.last(EDGE) for r in runs.values() if r.broken is None] for c, runs in kept.items()}
    rewards = {cell: values for cell, values in rewards.items() if values}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, width_ratios=(3, 2))
    _by_staleness(left, rewards)
    _by_replay(right, rewards)
    left.set_ylabel(f"reward, last {EDGE} steps")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path / "compare_objectives.png", dpi=120)


def _by_staleness(axis, rewards: dict[Cell, list[float]]) -> None:
    bounds = sorted({cell.staleness for cell in rewards})
    for number, (name, colour) in enumerate(COLOURS.items()):
        own = [c for c in rewards if c.objective == name and c.replay == "r3"]
        at = [bounds.index(c.staleness) + 0.08 * (number - 2) for c in own]
        axis.plot(at, [np.mean(rewards[c]) for c in own], color=colour, label=name)
        for x, cell in zip(at, own, strict=True):
            axis.plot([x] * len(rewards[cell]), rewards[cell], "o", color=colour, markersize=4)
    axis.set_xticks(range(len(bounds)), [str(bound) for bound in bounds])
    axis.set_xlabel("max_staleness")
    axis.set_title("R3, int8 rollouts", fontsize=10)
    axis.legend(fontsize=8)


def _by_replay(axis, rewards: dict[Cell, list[float]]) -> None:
    ends = sorted({cell.staleness for cell in rewards if cell.replay == "none"})
    places = [(name, bound) for name in WITH_REPLAYS for bound in ends]
    for number, (replay, colour) in enumerate((("none", "#4d4d4d"), ("r2", "#1b6ca8"), ("r3", "#d1495b"))):
        for place, (name, bound) in enumerate(places):
            values = rewards.get(Cell(name, bound, replay), [])
            x = place + 0.25 * (number - 1)
            axis.plot([x] * len(values), values, "o", color=colour, markersize=4)
            if values:
                axis.plot([x - 0.1, x + 0.1], [np.mean(values)] * 2, color=colour, linewidth=2)
        axis.plot([], [], color=colour, linewidth=2, label=replay)
    axis.set_xticks(range(len(places)), [f"{name}\n{bound}" for name, bound in places])
    axis.set_xlabel("objective, max_staleness")
    axis.set_title("by replay", fontsize=10)
    axis.legend(title="replay", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--figure", type=Path, help="folder for compare_objectives.png")
    parser.add_argument("--table", action="store_true", help="make no run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    kept: dict[Cell, dict[int, KeptRun]] = {cell: {} for cell in cells(options.objectives, options.staleness)}
    for seed in options.seeds:
        with Session(seed, options.overrides) as session:
            for cell, runs in kept.items():
                file, settings = options.out / f"{cell.name(seed)}.json", cell.settings(seed, options.overrides)
                began = time.perf_counter()
                if options.table:
                    run = look(file, settings)
                else:
                    run = keep(file, settings, lambda s=settings: session.steps(s))
                if run is not None:
                    runs[seed] = run
                    said = run.broken or f"{run.last(EDGE):.3f}"
                    print(
                        f"{cell.name(seed)}: {said} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True
                    )
    table(kept)
    if options.figure is not None:
        draw(kept, options.figure)


if __name__ == "__main__":
    main()
