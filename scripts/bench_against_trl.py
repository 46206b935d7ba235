"""Seconds of an RL step beside TRL's GRPOTrainer: the same model, 32 prompts x 8 samples, the same lengths of answers.

    uv venv .venv/trl && uv pip install --python .venv/trl/bin/python trl==1.16.0 torch==2.14.1 transformers==5.19.0
    .venv/bin/python -m scripts.bench_against_trl --trl .venv/trl/bin/python [--pairs 5] [--steps 10] [--only fixed]

The model has 4 layers, width 64, 8 experts, top 2, float32. Both train it by ratios of sequences, in four micro-batches
and one optimizer step. `fixed`: every answer has 16 tokens. `mixed`: 8 to 256, drawn log-uniformly. Each pair runs TRL,
sameroute in turn with its rollouts, and sameroute one step of staleness behind, one after another, each in processes of
its own on both cores. Printed are the medians over the pairs of the seconds a step, and the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.data.tiny_model import make_tiny_model
from pipeline.loop.asynchronous import asynchronous
from pipeline.loop.inputs import prompt_source
from pipeline.loop.open_loop import open_loop
from scripts.bench_async import CONFIG, draw_lengths
from scripts.bench_step import SETTINGS

WARM = 3
LENGTHS = {"fixed": (16, 16), "mixed": (8, 256)}


@dataclass(frozen=True)
class Case:
    """What one process measures. staleness: rollout.max_staleness."""

    lengths: str
    staleness: int
    steps: int

    def config(self) -> Config:
        """Of sameroute."""
        longest = LENGTHS[self.lengths][1]
        return load_config(
            CONFIG,
            [*SETTINGS, f"rollout.max_new_tokens={longest}", f"server.context_length={longest + 64}",
             "server.max_total_tokens=131072", f"rollout.max_staleness={self.staleness}",
             "trainer.micro_batch_tokens=2048" if self.lengths == "fixed" else "trainer.micro_batch_tokens=8192"],
        )  # fmt: skip


def ours(case: Case) -> float:
    """Seconds of a step: the median in turn, the mean beside training, where a step may wait for the next."""
    draw_lengths(*LENGTHS[case.lengths])
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        count = WARM + case.steps
        with open_loop(case.config(), Path(folder), logs) as (loop, _), asynchronous(loop, count + 9, None):
            ends = []
            for number in range(1, count + 1):
                loop.step(number)
                ends.append(time.monotonic())
    seconds = [b - a for a, b in itertools.pairwise(ends)][WARM - 1 :]
    return statistics.fmean(seconds) if case.staleness else statistics.median(seconds)


def said(command: list[str]) -> float:
    """The seconds that a process prints last. Raises RuntimeError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def pair(lengths: str, steps: int, trl: Path, folder: Path) -> dict[str, float]:
    """Seconds a step of each."""
    model, prompts = folder / "model", folder / "prompts.json"
    config = Case(lengths, 0, steps).config()
    if not model.exists():
        assert config.model.tiny is not None
        make_tiny_model(model, config.model.tiny, config.run.seed)
        source = prompt_source(config, model)
        prompts.write_text(json.dumps([p.text for p in source.take(512)]))
    longest = [str(n) for n in LENGTHS[lengths]]
    beside = [
        "scripts/trl_step.py",
        str(model),
        "--prompts",
        str(prompts),
        "--lengths",
        *longest,
        "--steps",
        str(steps),
    ]
    found = {"TRL": said([str(trl), *beside])}
    for staleness in (0, 1):
        own = ["-m", "scripts.bench_against_trl", "--one", lengths, str(staleness), "--steps", str(steps)]
        found[f"sameroute, max_staleness={staleness}"] = said([sys.executable, *own])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="a Python that has TRL")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps, after {WARM} that warm up")
    parser.add_argument("--only", choices=LENGTHS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # one measurement of ours, as JSON
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"seconds": ours(Case(options.one[0], int(options.one[1]), options.steps))}))
        return
    if options.trl is None or not options.trl.is_file():
        parser.error("--trl wants a Python that has TRL; the first lines of this script say how to make one")
    print("| answers | | seconds a step | against TRL | of the pairs |\n|---|---|---|---|---|")
    for lengths in [options.only] if options.only else LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            pairs = [pair(lengths, options.steps, options.trl, Path(folder)) for _ in range(options.pairs)]
        for name in pairs[0]:
            ratios = [found[name] / found["TRL"] for found in pairs]
            middle = statistics.median(found[name] for found in pairs)
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {lengths} | {name} | {middle:.2f} | {statistics.median(ratios):.2f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
