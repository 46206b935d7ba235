"""A dense language model taught sums by sameroute and by TRL's GRPOTrainer: steps, seconds, held-out accuracy.

    make language-model
    .venv/bin/python -m scripts.language_beside_trl OUT [--steps 20] [--seeds 0 1]

The model is models/SmolLM2-135M-Instruct, the task and all settings those of configs/smollm2-moe/arithmetic.yaml but
the experts: the same questions in the same order, 8 answers each, the same temperature, ratios of sequences, one
update a step, Adam with the same moments and a rate that does not decay, float32, all cores. Both trained models and
the one that they began with answer the same held-out questions, by `sameroute evaluate`. What is in OUT already is not
made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.data.prompts import PromptSource
from pipeline.loop.inputs import prompt_source
from scripts.bench_against_trl import trl_python
from scripts.kept_runs import print_table

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
CONFIG = ROOT / "configs" / "smollm2-moe" / "arithmetic.yaml"
SETTINGS = [f"model.path={MODEL}", "replay=none", "train.decay_steps=null"]
SAMEROUTE = str(Path(sys.executable).parent / "sameroute")
TITLES = ("seed", "", "steps", "seconds a step", "of the training", "held-out before", "after", "reward, last 5 steps")


def command(*words: object) -> str:
    """What it prints. Raises RuntimeError with the end of what it said where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{words[:4]}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    return done.stdout


def held_out(out: Path, name: str, model: Path) -> str:
    """Accuracy with its interval."""
    file = out / f"{name}-evaluate" / "evaluation.json"
    if not file.exists():
        command(SAMEROUTE, "evaluate", CONFIG, "--model", model, "--out", file.parent, "replay=none")
    (row,) = json.loads(file.read_text())["sets"]
    mean, low, high = row["scores"]["reward"]
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def ours(directory: Path, seed: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds and rewards of the steps."""
    metrics = directory / "metrics.jsonl"
    if not (directory / "hf" / "config.json").exists():
        command(SAMEROUTE, "train", CONFIG, *SETTINGS, "evaluate=[]", f"run.seed={seed}", f"train.steps={steps}",
                f"run.directory={directory}")  # fmt: skip
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["time/step_s"] for row in rows], [row["reward/mean"] for row in rows]


def theirs(directory: Path, config: Config, trl: Path, threads: int) -> tuple[list[float], list[float]]:
    """Seconds and rewards of the steps."""
    said = directory / "said.json"
    if not said.exists():
        directory.mkdir(parents=True, exist_ok=True)
        rollout, train = config.rollout, config.train
        source = prompt_source(config, MODEL)
        assert isinstance(source, PromptSource)
        prompts = source.take(rollout.prompts_per_step * train.steps)
        told = {
            "questions": [{"prompt": p.text, "answer": str(p.metadata["answer"])} for p in prompts],
            "prompts": rollout.prompts_per_step, "samples": rollout.samples_per_prompt, "steps": train.steps,
            "tokens": rollout.max_new_tokens, "temperature": config.precision.temperature, "lr": train.lr,
            "warmup_steps": train.warmup_steps, "beta2": train.beta2, "seed": config.run.seed, "threads": threads,
        }  # fmt: skip
        (directory / "settings.json").write_text(json.dumps(told))
        printed = command(trl, "scripts/trl_language.py", MODEL, "--settings", directory / "settings.json", "--out",
                          directory / "hf")  # fmt: skip
        said.write_text(printed.splitlines()[-1])
    found = json.loads(said.read_text())
    return found["seconds"], found["rewards"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trl", type=Path, help="a Python that has TRL; default: .venv/trl, which is made")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2, help="of TRL")
    options = parser.parse_args()
    out, trl = options.out.absolute(), (options.trl or trl_python()).absolute()
    before = held_out(out, "start", MODEL)
    rows = []
    for seed in options.seeds:
        config = load_config(CONFIG, [*SETTINGS, f"run.seed={seed}", f"train.steps={options.steps}"])
        runs = {
            "TRL": (out / f"trl-{seed}", theirs(out / f"trl-{seed}", config, trl, options.threads)),
            "sameroute": (out / f"own-{seed}", ours(out / f"own-{seed}", seed, options.steps)),
        }
        for name, (directory, (seconds, rewards)) in runs.items():
            after = held_out(out, directory.name, directory / "hf")
            last = statistics.fmean(rewards[-5:])
            rows.append([str(seed), name, str(len(seconds)), f"{statistics.median(seconds):.1f}",
                         f"{sum(seconds):.0f}", before, after, f"{last:.3f}"])  # fmt: skip
    print_table(TITLES, rows)


if __name__ == "__main__":
    main()
