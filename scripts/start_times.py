"""Seconds from a command's start to its end, for the commands that start no engine.

    .venv/bin/python scripts/start_times.py [--rounds 5] [--run RUN]

Each command runs once to warm the page cache, then `rounds` times; printed are the median and the processor's seconds,
which other work on the machine moves less. `report` needs a run directory, and is left out without --run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    (["--help"], 0),
    (["--version"], 0),
    (["objectives"], 0),
    (["objectives", "gspo"], 0),
    (["plan", "configs/qwen3-30b-a3b/2-nodes.yaml"], 0),
    (["plan", "configs/quickstart.yaml"], 0),
    (["train", "configs/quickstart.yaml", "train.lrr=1"], 2),
    (["train", "nowhere.yaml"], 2),
    (["train", "configs/quickstart.yaml", "objective.preset=gspoo"], 2),
    (["train", "configs/quickstart.yaml", "data.task=null", "data.path=nowhere.jsonl"], 2),
)
"""Arguments, and the exit code."""


def timed(words: list[str], code: int) -> tuple[float, float]:
    """(seconds on the wall, seconds of the processor) of one call. Raises RuntimeError for another exit code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sameroute", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}, not {code}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of the commands that start no engine.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a run directory, for `report`")
    options = parser.parse_args()
    commands = list(COMMANDS)
    if options.run is not None:
        commands.append((["report", str(options.run.resolve())], 0))
    print(f"{'wall':>6} {'cpu':>6}  seconds, medians of {options.rounds}")
    for words, code in commands:
        timed(words, code)
        rounds = [timed(words, code) for _ in range(options.rounds)]
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{wall:6.2f} {cpu:6.2f}  sameroute {' '.join(words)}")


if __name__ == "__main__":
    main()
