"""Whether an earlier revision and this one compute the same run, bit for bit: both are run here, from git.

    .venv/bin/python scripts/same_as_before.py [--revision cb4cf9a] [--steps 3] [OVERRIDE ...]

The default revision is the last one before asynchronous rollouts, which `rollout.max_staleness=0` equals. Compared are
all arrays of every dump (tokens, log-probs, routes, versions, rewards), all metrics that no clock decides, and every
tensor of the model that is written, as far as both have them; the others are named. Exit code 1 where something
differs.

No numbers of the earlier revision are kept in a file: another CPU rounds otherwise, and a token that is sampled from
rounded logits may become another one. Two runs on one machine are equal or not, whichever machine that is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from pipeline.dumps.dump import dump_path

ROOT = Path(__file__).resolve().parents[1]
LAST_IN_TURN = "cb4cf9a"
RUN = (
    "server.deterministic=true", "debug.dump_rollouts=true", "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4", "train.mini_batches=2", "supervised.steps=5", "supervised.decay_steps=null",
    "supervised.warmup_steps=0", "train.decay_steps=null", "checks.first_rollouts=0",
)  # fmt: skip
REWARD = "tests.support.verifiers:length"
"""Of an untrained model's answers too: rewards that differ."""


def main() -> int:
    """Run both, print what was compared and what differs; 1 where something does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default=LAST_IN_TURN)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of configs/quickstart.yaml, for both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree, runs = Path(folder) / "tree", [Path(folder) / name for name in ("before", "now")]
        git("worktree", "add", "--detach", str(tree), options.revision)
        try:
            for code, run in zip((tree, ROOT), runs, strict=True):
                train(code, run, [*RUN, f"train.steps={options.steps}", *options.overrides])
        finally:
            git("worktree", "remove", "--force", str(tree))
        before, now = (dict(figures(run, options.steps)) for run in runs)
    return compared(before, now)


def git(*arguments: str) -> None:
    """In this repository."""
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.DEVNULL)


def train(code: Path, run: Path, overrides: list[str]) -> None:
    """The quickstart, by the code of a tree."""
    field = "rewards" if "rewards" in (code / "pipeline/config/tree.py").read_text() else "data.reward"
    overrides = [f"{field}={REWARD}", *overrides]
    words = [sys.executable, "sameroute.py", "train", "configs/quickstart.yaml", f"run.directory={run}", *overrides]
    environment = os.environ | {"PYTHONPATH": str(code)}
    subprocess.run(words, cwd=code, env=environment, check=True)


def figures(run: Path, steps: int) -> Iterator[tuple[str, Any]]:
    """Name and value of all that is compared."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name, value in row.items():
            if not name.startswith(("time/", "throughput/")):
                yield f"step {row['step']} {name}", value
    for step in range(1, steps + 1):
        arrays = load_file(dump_path(run / "dumps", step))  # a reader of today refuses what an earlier one wrote
        prompts = json.loads(arrays.pop("prompts").tobytes())  # which have an origin today
        arrays["prompts"] = np.array(json.dumps([[p["text"], p["metadata"], p["index"]] for p in prompts]))
        yield from ((f"step {step} dump {name}", array) for name, array in arrays.items())
    for file in sorted((run / "hf").glob("*.safetensors")):
        yield from ((f"weight {name}", tensor) for name, tensor in load_file(file).items())


def compared(before: dict[str, Any], now: dict[str, Any]) -> int:
    """Print how two runs differ; 1 where they do, or where nothing was compared."""
    both = [name for name in before if name in now]
    differ = [name for name in both if not equal(before[name], now[name])]
    alone = sorted({name.split(" ", 2)[-1] for name in before.keys() ^ now.keys()})
    print(f"{len(both)} figures compared, {len(differ)} differ: {', '.join(differ[:10]) or 'none'}")
    print(f"in one of the two only: {', '.join(alone) or 'none'}")
    return int(bool(differ) or not both)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit; NaN equals itself."""
    if not isinstance(one, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


if __name__ == "__main__":
    sys.exit(main())
