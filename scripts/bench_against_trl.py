"""Seconds of an RL step beside TRL's GRPOTrainer: the same model, prompts and samples, the same lengths of answers.

    .venv/bin/python -m scripts.bench_against_trl [--pairs 5] [--steps 10] [--only fixed]
    .venv/bin/python -m scripts.bench_against_trl --model models/SmolLM2-135M-Instruct --pairs 3 --steps 4 --only fixed

TRL has an environment of its own, .venv/trl, which the first call makes (uv, PyPI); --trl names another Python.

Without --model it is 4 layers, width 64, 8 experts, top 2, and a step is of 32 prompts x 8 samples; a model of
`make language-model` is asked for sums, 8 prompts x 8 samples. Both are float32. Both train by ratios of sequences, in
four micro-batches and one optimizer step. `fixed`: every answer has 16 tokens. `mixed`: 8 to 256, drawn log-uniformly.
Each pair runs TRL, sameroute in turn with its rollouts and one step of staleness behind, and both of these with a
trainer rank and a server a core, one after another, each in processes of its own on both cores. A real model is not
split: two ranks and two servers of it are more memory than a laptop has. Printed are medians over the pairs of the
seconds a step, and the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
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

LENGTHS = {"fixed": (16, 16), "mixed": (8, 256)}
OWN = {
    "sameroute, rollouts in turn": (0, 1),
    "the same, a rank and a server a core": (0, 2),
    "sameroute, max_staleness=1": (1, 1),
    "max_staleness=1, a rank and a server a core": (1, 2),
}
"""Staleness; trainer ranks, and servers."""
SAMPLES, MICRO_BATCHES = 8, 4
ROOT = Path(__file__).parent.parent
LANGUAGE = ROOT / "configs" / "smollm2-moe" / "arithmetic.yaml"
ENVIRONMENT = ROOT / ".venv" / "trl"
PACKAGES = ("trl==1.16.0", "torch==2.14.1", "transformers==5.19.0")


@dataclass(frozen=True)
class Case:
    """What one process measures. model: a Hugging Face directory; None: the tiny one. staleness: of the rollouts.
    engines: trainer ranks, and servers."""

    model: Path | None
    lengths: str
    staleness: int
    engines: int
    steps: int

    @property
    def prompts(self) -> int:
        """Of a step."""
        return 32 if self.model is None else 8

    @property
    def warm(self) -> int:
        """Steps that are not timed."""
        return 3 if self.model is None else 1

    def config(self) -> Config:
        """Of sameroute."""
        longest = LENGTHS[self.lengths][1]
        own = [*SETTINGS, "server.max_total_tokens=131072"]
        if self.model is not None:
            own = [f"model.path={self.model}", "evaluate=[]", "train.mini_batches=1", "precision.temperature=1.0",
                   "objective.correction={kind: geometric_tis, high: 2.0}",
                   f"rollout.samples_per_prompt={SAMPLES}", "server.max_total_tokens=32768"]  # fmt: skip
        tokens = 2048 if self.lengths == "fixed" else 8192
        return load_config(
            CONFIG if self.model is None else LANGUAGE,
            [*own, f"rollout.prompts_per_step={self.prompts}", f"rollout.max_new_tokens={longest}",
             f"server.context_length={longest + 72}", f"rollout.max_staleness={self.staleness}",
             f"parallel.ranks={self.engines}", f"server.replicas={self.engines}",
             f"trainer.micro_batch_tokens={tokens if self.model is None else tokens // 2}"],
        )  # fmt: skip


def ours(case: Case) -> float:
    """Seconds of a step: the median in turn, the mean beside training, where a step may wait for the next."""
    draw_lengths(*LENGTHS[case.lengths])
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        count = case.warm + case.steps
        with open_loop(case.config(), Path(folder), logs) as (loop, _), asynchronous(loop, count + 9, None):
            ends = []
            for number in range(1, count + 1):
                loop.step(number)
                ends.append(time.monotonic())
    seconds = [b - a for a, b in itertools.pairwise(ends)][case.warm - 1 :]
    return statistics.fmean(seconds) if case.staleness else statistics.median(seconds)


def said(command: list[str]) -> float:
    """The seconds that a process prints last. Raises RuntimeError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def pair(case: Case, trl: Path, folder: Path) -> dict[str, float]:
    """Seconds a step of each."""
    model, prompts, config = case.model or folder / "model", folder / "prompts.json", case.config()
    if not prompts.exists():
        if case.model is None:
            assert config.model.tiny is not None
            make_tiny_model(model, config.model.tiny, config.run.seed)
        prompts.write_text(json.dumps([p.text for p in prompt_source(config, model).take(512)]))
    numbers = {
        "--steps": case.steps,
        "--warm": case.warm,
        "--batch": case.prompts * SAMPLES // MICRO_BATCHES,
        "--accumulate": MICRO_BATCHES,
        "--generations": SAMPLES,
    }
    beside = ["scripts/trl_step.py", str(model), "--prompts", str(prompts), "--lengths"]
    beside += [*map(str, LENGTHS[case.lengths]), *(str(x) for pair in numbers.items() for x in pair)]
    found = {"TRL": said([str(trl), *beside])}
    for name, (staleness, engines) in OWN.items():
        if engines > 1 and case.model is not None:
            continue
        own = ["-m", "scripts.bench_against_trl", "--one", case.lengths, str(staleness), str(engines)]
        own += ["--steps", str(case.steps), *([] if case.model is None else ["--model", str(case.model)])]
        found[name] = said([sys.executable, *own])
    return found


def trl_python() -> Path:
    """That of TRL's environment, which is made where it is not there."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    if not ready.exists():
        uv = shutil.which("uv") or str(ROOT / ".tools" / "bin" / "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(ENVIRONMENT)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *PACKAGES], check=True)
        ready.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="a Python that has TRL")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory of `make language-model`")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after some that warm up")
    parser.add_argument("--only", choices=LENGTHS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # one measurement of ours, as JSON
    options = parser.parse_args()
    model = None if options.model is None else options.model.resolve()
    if model is not None and not (model / "config.json").is_file():
        parser.error(f"--model {options.model} is no Hugging Face directory; `make language-model` makes two")
    if options.one:
        lengths, staleness, engines = options.one
        print(json.dumps({"seconds": ours(Case(model, lengths, int(staleness), int(engines), options.steps))}))
        return
    if options.trl is not None and not options.trl.is_file():
        parser.error(f"--trl {options.trl} is no Python; leave it out, and one with TRL is made")
    trl = options.trl or trl_python()
    print("| answers | | seconds a step | against TRL | of the pairs |\n|---|---|---|---|---|")
    for lengths in [options.only] if options.only else LENGTHS:
        case = Case(model, lengths, 0, 1, options.steps)
        with tempfile.TemporaryDirectory() as folder:
            pairs = [pair(case, trl, Path(folder)) for _ in range(options.pairs)]
        for name in pairs[0]:
            ratios = [found[name] / found["TRL"] for found in pairs]
            middle = statistics.median(found[name] for found in pairs)
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {lengths} | {name} | {middle:.2f} | {statistics.median(ratios):.2f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
