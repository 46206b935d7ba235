"""Steps a second of the quickstart's task with rollouts in turn with the training, and beside it.

    .venv/bin/python scripts/bench_async.py [--steps 20] [--staleness 0 1 4] [--lengths 8 256] [section.field=value ...]

One run of both engines for each `rollout.max_staleness`, one after another, from the same weights. The model is not
trained before, so that answers have the lengths that --lengths says, drawn log-uniformly by prompt and sample: without
it answers end as they end.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pipeline.config import load_config
from pipeline.loop.asynchronous import asynchronous
from pipeline.loop.open_loop import open_loop
from pipeline.rollout import answers, sampler

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = ["supervised.steps=60", "checks.first_rollouts=0", "checks.probe_every=0"]
WARM = 5


def draw_lengths(shortest: int, longest: int) -> None:
    """From now on answers are so long, whatever the model says."""
    of_sample = sampler.of_sample

    def drawn(sampling, prompt, number):
        share = random.Random(f"{prompt.index} {number}").random()
        tokens = round(math.exp(math.log(shortest) + share * math.log(longest / shortest)))
        return replace(of_sample(sampling, prompt, number), max_new_tokens=tokens, ignore_eos=True, stop_token_ids=())

    sampler.of_sample = answers.of_sample = drawn


def measure(staleness: int, steps: int, overrides: list[str]) -> dict[str, float]:
    """Medians over the steps of one run."""
    config = load_config(CONFIG, [*SETTINGS, f"rollout.max_staleness={staleness}", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        with open_loop(config, Path(folder), logs) as (loop, _), asynchronous(loop, WARM + steps + 9, None):
            rows, began = [], 0.0
            for number in range(1, WARM + steps + 1):
                if number == WARM + 1:
                    began = time.monotonic()
                rows.append(loop.step(number).metrics)
            seconds = (time.monotonic() - began) / steps
    rows = rows[WARM:]
    means = {
        key: statistics.fmean(row.get(key, 0.0) for row in rows)
        for key in ("rollout/lag_mean", "idle/trainer", "idle/servers", "reward/mean", "response/length_mean")
    }
    return {"seconds": seconds} | means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps, after {WARM} that warm up")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--lengths", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    overrides = list(options.overrides)
    if options.lengths:
        draw_lengths(*options.lengths)
        longest = options.lengths[1]
        overrides = [f"rollout.max_new_tokens={longest}", f"server.context_length={longest + 64}",
                     "server.max_total_tokens=65536", *overrides]  # fmt: skip
    print("| max_staleness | steps a second | against 0 | lag | trainer idle | servers idle | tokens an answer |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for staleness in options.staleness:
        found = measure(staleness, options.steps, overrides)
        first = first or found["seconds"]
        cells = [
            str(staleness),
            f"{1 / found['seconds']:.2f}",
            f"{first / found['seconds']:.2f} times",
            f"{found['rollout/lag_mean']:.1f}",
            *(f"{found[key]:.0%}" if staleness else "" for key in ("idle/trainer", "idle/servers")),
            f"{found['response/length_mean']:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
