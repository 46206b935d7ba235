"""Policy drift: four objectives, three kinds of replay and three numbers of updates a step, under a rollout engine that
holds int8 weights.

    .venv/bin/python scripts/policy_drift.py [--steps 40] [--seeds 0 1] [--out docs/figures]

Both engines are real. The server gets every linear layer of attention and experts rounded to int8, one scale a row,
and back (router, embeddings, norms and LM head stay), so mu is another policy than pi_o at the same weights, as it is
under a quantised rollout. Every run starts from the same supervised policy and sees the same prompts. Writes one JSON
line a run (policy_drift.jsonl) and policy_drift.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from pipeline.config import load_config
from pipeline.data.prompts import PromptSource
from pipeline.loop.loop import Loop
from pipeline.loop.open_loop import open_loop

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
CORRECTION = "correction: {kind: token_tis, high: 2}"
OBJECTIVES = {
    "grpo": f"{{preset: grpo, {CORRECTION}}}",
    "gspo": "{preset: gspo, clip_low: 0.02, clip_high: 0.03, correction: {kind: geometric_tis, high: 2}}",
    "minirl": "{preset: minirl}",
    "dr_gspo": "{preset: dr_gspo, clip_low: 0.02, clip_high: 0.03, correction: {kind: geometric_tis, high: 2}}",
}
REPLAYS, MINI_BATCHES = ("none", "r2", "r3"), (1, 4, 8)
SETTINGS = ["precision.rollout_weights=int8", "rollout.prompts_per_step=16", "train.warmup_steps=0",
            "train.decay_steps=null", "train.lr=3e-4",
            "checks.max_abs_logprob=10", "checks.probe_every=0"]  # fmt: skip
KEYS = ("reward/mean", "mismatch/k3", "mismatch/f2", "policy/entropy", "routing/agreement", "train/grad_norm")


def to_start(rank) -> None:
    """Runs in a trainer rank."""
    rank.trainer.policy.copy_from(rank.trainer.reference)


def run(session: Loop, objective: str, replay: str, mini_batches: int, seed: int, steps: int, model: Path) -> dict:
    """One training run in the session's engines; its curves by metric."""
    config = load_config(
        QUICKSTART,
        [*SETTINGS, f"objective={OBJECTIVES[objective]}", f"replay={replay}", f"train.mini_batches={mini_batches}"],
    )
    ray.get([rank.__ray_call__.remote(to_start) for rank in session.trainers.ranks])
    session.trainers.restart_optimizer(config.train)
    source = PromptSource(config.data, model, seed=seed + 1, trust_remote_code=config.model.trust_remote_code)
    loop = replace(session, config=config, source=source)
    loop.sync()
    curves: dict[str, list[float]] = {key: [] for key in KEYS}
    for number in range(1, steps + 1):
        metrics = loop.step(number).metrics
        for key in KEYS:
            curves[key].append(metrics.get(key, float("nan")))
    return {"objective": objective, "replay": replay, "mini_batches": mini_batches, "seed": seed, "curves": curves}


def draw(runs: list[dict], path: Path) -> None:
    """Reward over the steps: a row an objective, a column a number of updates, a line a kind of replay."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(OBJECTIVES), len(MINI_BATCHES), figsize=(10, 10), sharex=True, sharey=True)
    for row, objective in zip(axes, OBJECTIVES, strict=True):
        for axis, count in zip(row, MINI_BATCHES, strict=True):
            for replay, colour in zip(REPLAYS, ("#4d4d4d", "#1b6ca8", "#d1495b"), strict=True):
                chosen = [
                    r["curves"]["reward/mean"]
                    for r in runs
                    if (r["objective"], r["replay"], r["mini_batches"]) == (objective, replay, count)
                ]
                mean = np.mean(chosen, 0)
                smooth = np.convolve(mean, np.ones(5) / 5, "valid")
                axis.plot(np.arange(len(smooth)) + 5, smooth, color=colour, label=replay)
            axis.set_title(f"{objective}, {count} update{'s' if count > 1 else ''} a step", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("reward")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(title="replay")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(runs: list[dict]) -> None:
    """Mean reward of the last ten steps and mean k3 of the run, over the seeds."""
    print(f"{'objective':10}{'updates':>8}" + "".join(f"{r + ' reward':>14}{r + ' k3':>11}" for r in REPLAYS))
    for objective in OBJECTIVES:
        for count in MINI_BATCHES:
            line = f"{objective:10}{count:8}"
            for replay in REPLAYS:
                chosen = [
                    r["curves"]
                    for r in runs
                    if (r["objective"], r["replay"], r["mini_batches"]) == (objective, replay, count)
                ]
                line += f"{np.mean([c['reward/mean'][-10:] for c in chosen]):14.3f}"
                line += f"{np.mean([c['mismatch/k3'] for c in chosen]):11.1e}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    # A KL in the configuration makes the trainer keep the supervised policy, to which every run goes back.
    start = load_config(QUICKSTART, [*SETTINGS, "supervised.steps=180", "objective={preset: grpo, kl: {beta: 1.0}}"])
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "logs").mkdir()
        with (
            open_loop(start, Path(folder), Path(folder) / "logs") as (session, model),
            (options.out / "policy_drift.jsonl").open("w") as file,
        ):
            for seed in options.seeds:
                for objective in OBJECTIVES:
                    for count in MINI_BATCHES:
                        for replay in REPLAYS:
                            runs.append(run(session, objective, replay, count, seed, options.steps, model))
                            file.write(json.dumps(runs[-1]) + "\n")
                            file.flush()
                            last = np.mean(runs[-1]["curves"]["reward/mean"][-10:])
                            print(f"seed {seed} {objective} {replay} {count}: {last:.3f}", flush=True)
    table(runs)
    draw(runs, options.out / "policy_drift.png")


if __name__ == "__main__":
    main()
