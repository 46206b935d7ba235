"""Seconds of a synchronous RL step, by phase: 32 prompts x 8 samples x 16 new tokens, 4 micro-batches of training.

    .venv/bin/python scripts/bench_step.py [--steps 20] [section.field=value ...]

The model has 4 layers, width 64, 8 experts, top 2; every response is 16 tokens long. Both engines, Ray, GSPO, routes
replayed, the weight transfer and the check of every step are those of `sameroute train`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from pipeline.config import load_config
from pipeline.loop.open_loop import open_loop

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = [
    "supervised.steps=0",
    "train.mini_batches=1",
    "train.lr=1e-4",
    "rollout.prompts_per_step=32",
    "rollout.samples_per_prompt=8",
    "rollout.max_new_tokens=16",
    "trainer.micro_batch_tokens=2048",
    "model.tiny={layers: 4, hidden: 64, experts: 8, topk: 2, moe_intermediate: 64}",
]
PHASES = ("rollout", "reward", "train", "sync", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after 3 that warm up")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    config = load_config(CONFIG, SETTINGS + options.overrides)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        with open_loop(config, Path(folder), logs) as (loop, _):
            loop.sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
            steps, groups = [], []
            for number in range(1, options.steps + 4):
                result = loop.step(number)
                metrics, groups = result.metrics, result.batch.groups
                steps.append(metrics)
    steps = steps[3:]
    sequences = sum(len(g.rollouts) for g in groups)
    tokens = sum(len(r.prompt_ids) + len(r) for g in groups for r in g.rollouts)
    print(f"{sequences} sequences, {tokens / sequences:.1f} tokens each with their prompts; {len(steps)} steps")
    median = {phase: statistics.median(s[f"time/{phase}_s"] for s in steps) for phase in PHASES}
    for phase in PHASES:
        low, high = (pick(s[f"time/{phase}_s"] for s in steps) for pick in (min, max))
        print(
            f"{phase:8} median {median[phase]:.3f} s  min {low:.3f}  max {high:.3f}  "
            f"{median[phase] / median['step']:4.0%} of the step"
        )


if __name__ == "__main__":
    main()
