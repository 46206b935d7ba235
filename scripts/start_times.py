"""Seconds from a command's start to its end, for the commands that start no engine, and to a run's first step.

    .venv/bin/python scripts/start_times.py [--rounds 5]

Each command runs once to warm the page cache, then `rounds` times; printed are the median and the processor's seconds,
which other work on the machine moves less. The run is the quickstart's without its supervised steps, made once.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
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
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def timed(words: list[str], code: int) -> tuple[float, float]:
    """(seconds on the wall, seconds of the processor) of one call. Raises RuntimeError for another exit code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sameroute", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}, not {code}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_run(directory: Path) -> None:
    """Make a run of one step, and print when that was done and when all was. Raises RuntimeError where it fails."""
    settings = ["supervised.steps=0", "train.steps=1", f"run.directory={directory}"]
    command = [sys.executable, "-m", "sameroute", "train", "configs/quickstart.yaml", *settings]
    began, said = time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            said.append(line)
            if line.startswith("step 1/1"):
                print(
                    f"{time.monotonic() - began:6.2f}         the quickstart without supervised steps: its first step"
                )
    if run.returncode:
        raise RuntimeError(f"the run ended with {run.returncode}: {''.join(said)}")
    print(f"{time.monotonic() - began:6.2f}         and its end", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of the commands that start no engine, and to a first step.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{'wall':>6} {'cpu':>6}  seconds, medians of {options.rounds}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        print_run(run)
        for words, code in (*COMMANDS, (["report", str(run)], 0)):
            timed(words, code)
            rounds = [timed(words, code) for _ in range(options.rounds)]
            wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{wall:6.2f} {cpu:6.2f}  sameroute {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
