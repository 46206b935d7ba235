"""The acceptance on a machine with GPUs, whole: kernels, the trainer, Transformer Engine, both engines, a preset.

    .venv/bin/python scripts/gpu_acceptance.py OUT [--only STEP ...] [--again STEP ...] [--device cpu]
                                               [--address HOST:6379] [--preset CONFIG [section.field=value ...]]

The steps are those of docs/gpu-acceptance.md, one after another. OUT/acceptance.json has what each showed,
OUT/acceptance.md the same as a page, OUT/NAME.log what it said. The same command goes on where it was stopped: a step
that has passed on this kind of GPU, with these versions of the packages and this commit, is not made again, unless
--again names it. A step that this machine cannot run is left out, and the reason is told.
--address names a Ray cluster of two machines with four GPUs each for a step that takes both (`machines`); this one is
its head, and OUT a folder that both see. --device cpu makes the steps of both engines on a machine without a GPU,
small: a trial of this program.
Exit code 0: every step that could run has passed. 1: one has failed. 2: none could run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pipeline.observe.facts import host_facts

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "configs/quickstart.yaml"
SAMEROUTE = [sys.executable, "-m", "sameroute"]
TWO_RANKS = ["parallel.ranks=2", "parallel.expert=2"]
IMAGE = (
    "docker build --tag sameroute:acceptance . && docker run --rm --gpus all --ipc host --ulimit memlock=-1 "
    "sameroute:acceptance train configs/quickstart.yaml device=cuda precision.weights=bfloat16 train.steps=2"
)
PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-s"]
FEW = {"cuda": 20, "cpu": 2}
PHASES = {"rollout": "rollout", "logprob": "logprobs", "train": "update", "sync": "sync", "step": "step"}
"""time/..._s of a run, and the same of a plan. A run counts log-probs as a part of `train`."""


class StepFailed(Exception):
    """What a step should have shown and did not, in a sentence."""


@dataclass(frozen=True)
class Step:
    """words: the command. figures: read from OUT afterwards; raises StepFailed. gpus: that it takes. package, program:
    that it needs, of Python and of the system. sees: GPUs, the others are hidden; None: all. limit_s: after which it
    has failed."""

    name: str
    what: str
    words: list[str]
    figures: Callable[[Path], dict[str, float]]
    gpus: int = 1
    package: str | None = None
    program: str | None = None
    sees: int | None = None
    limit_s: float = 1200.0


def rows_of(directory: Path) -> list[dict[str, float]]:
    """The metrics of a run, a step each."""
    file = directory / "metrics.jsonl"
    if not file.exists():
        raise StepFailed(f"{file} was not written")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def figures_of_run(directory: Path, steps: int, *, replay: bool, senders: int | None = None) -> dict[str, float]:
    """What a run of both engines showed. senders: trainer ranks that have sent weights; None: however many. Raises
    StepFailed where it made fewer steps, where a transfer is missing, where other ranks sent, or where tokens did not
    take the sampler's experts, or took them unasked."""
    rows = rows_of(directory)
    if len(rows) != steps:
        raise StepFailed(f"{len(rows)} of {steps} steps were made")
    versions = [int(row["weights/version"]) for row in rows]
    if versions != list(range(versions[0], versions[0] + steps)):
        raise StepFailed(f"the versions of the weights are {versions}: a transfer is missing")
    replayed = [row.get("routing/replayed_fraction", 0.0) for row in rows]
    if set(replayed) != {float(replay)}:
        raise StepFailed(f"of the tokens {min(replayed):.1%} to {max(replayed):.1%} were replayed")
    sent = {int(row["sync/senders"]) for row in rows} if senders is not None else set[int]()
    if sent - {senders}:
        raise StepFailed(f"weights were sent by {sorted(sent)} ranks, not by {senders}")
    return {
        "mean |log pi_o - log mu|": fmean(row["mismatch/abs_logprob"] for row in rows),
        "largest |log pi_o - log mu|": max(row["mismatch/max_abs_logprob"] for row in rows),
        "k3": fmean(row["mismatch/k3"] for row in rows),
        "routes that agree": fmean(row.get("routing/agreement", float("nan")) for row in rows),
        "reward, first": rows[0]["reward/mean"],
        "reward, last": rows[-1]["reward/mean"],
        "seconds of a step": median(row["time/step_s"] for row in rows),
        "seconds of a transfer": median(row["time/sync_s"] for row in rows),
    }


def figures_of_diagnosis(out: Path) -> dict[str, float]:
    """Whether the engines agree, of diagnose.json."""
    found = json.loads((out / "diagnose.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def figures_of_preset(directory: Path, steps: int, preset: str, overrides: list[str]) -> dict[str, float]:
    """Seconds of the phases, measured over planned, at the mean length that was measured."""
    shown, rows = figures_of_run(directory, steps, replay=True), rows_of(directory)
    length = fmean(row["response/length_mean"] for row in rows)
    words = [*SAMEROUTE, "plan", preset, *overrides, "--mean-response", f"{length}", "--json"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    planned = json.loads(said.stdout)["seconds"]
    for measured, name in PHASES.items():
        seconds = median(row.get(f"time/{measured}_s", 0.0) for row in rows)
        if measured == "train":
            seconds -= median(row.get("time/logprob_s", 0.0) for row in rows)
        if planned[name] > 0:
            shown[f"{name}, measured / planned"] = seconds / planned[name]
    return shown


def small(device: str) -> list[str]:
    """Of the quickstart, as it is run here."""
    steps = [f"train.steps={FEW[device]}", "weights.checksum_every=1", "run.overwrite=true", f"device={device}"]
    if device == "cuda":
        return [*steps, "precision.weights=bfloat16"]
    return [*steps, "supervised.steps=20", "rollout.prompts_per_step=8"]


def quickstart(
    out: Path,
    device: str,
    name: str,
    what: str,
    *settings: str,
    replay: bool = True,
    senders: int | None = None,
    gpus: int = 1,
    sees: int | None = None,
) -> Step:
    """A step that is a run of the quickstart. replay, senders: as figures_of_run wants them."""
    directory = out / "runs" / name
    words = [*SAMEROUTE, "train", QUICKSTART, f"run.directory={directory}", *small(device), *settings]

    def figures(_: Path) -> dict[str, float]:
        return figures_of_run(directory, FEW[device], replay=replay, senders=senders)

    return Step(name, what, words, figures, gpus, sees=sees)


def steps_of(
    out: Path, device: str, preset: str | None, overrides: list[str], address: str | None = None
) -> list[Step]:
    """In their order. address: of a Ray cluster of two machines."""
    run = partial(quickstart, out, device)
    found = [
        Step("kernels", "log-prob heads, replayed selection, packing, beside float64 and the CPU",
             [*PYTEST, "tests/gpu/test_kernels.py"], lambda _: {}),
        Step("trainer", "four steps of plain torch layers, beside the CPU's",
             [*PYTEST, "tests/gpu/test_training.py"], lambda _: {}),
        Step("transformer_engine", "the same of Transformer Engine's layers",
             [*PYTEST, "tests/gpu/test_transformer_engine.py"], lambda _: {}, package="transformer_engine"),
        run("shared_memory", "both engines, weights by CUDA IPC", "weights.transport=shared_memory", sees=1),
        run("process_group", "the same by NCCL", "weights.transport=distributed", gpus=2),
        run("no_replay", "the same without replay", "replay=none", replay=False),
        run("turns", "both engines by turns on one GPU", "cluster.colocated=true", sees=1),
        run("servers", "two trainer ranks and two servers on the same two GPUs", *TWO_RANKS, "server.replicas=2",
            gpus=2, sees=2),
        run("context_parallel", "sequences cut over two trainer ranks", "parallel.ranks=2", "parallel.context=2",
            gpus=3),
        run("senders", "two trainer ranks that send to two servers at once, by NCCL", *TWO_RANKS, "server.replicas=2",
            "weights.transport=distributed", gpus=4, senders=2),
        run("parted", "a server of two GPUs with half of the experts and of the requests on each",
            "server.tensor_parallel=2", "server.replicas=1", "server.extra_args=[--ep-size, '2', --attn-dp-size, '2']",
            gpus=3),
        Step("diagnose", "the engines compared, part by part",
             [*SAMEROUTE, "diagnose", QUICKSTART, "--out", str(out / "diagnose"), *small(device)[3:]],
             lambda _: figures_of_diagnosis(out / "diagnose")),
        Step("image", "the image built, and two steps of the quickstart in it", ["sh", "-c", IMAGE], lambda _: {},
             program="docker", limit_s=2 * 3600.0),
    ]  # fmt: skip
    if address is not None:
        both = [f"cluster={{address: {address}, nodes: 2, gpus_per_node: 4}}", "server.tensor_parallel=4"]
        found.append(
            run("machines", "trainer ranks and one server over two machines", *both, "server.replicas=1",
                "parallel.ranks=4", "parallel.expert=4", gpus=4)
        )  # fmt: skip
    if preset is not None:
        directory, ten = out / "runs" / "preset", ["train.steps=10", "run.overwrite=true"]
        words = [*SAMEROUTE, "train", preset, f"run.directory={directory}", *ten, *overrides]

        def figures(_: Path) -> dict[str, float]:
            return figures_of_preset(directory, 10, preset, overrides)

        found.append(Step("preset", f"ten steps of {preset}, beside its plan", words, figures, limit_s=4 * 3600.0))
    return found


def left_out(step: Step, device: str, gpus: int) -> str | None:
    """Why this machine cannot run it, or None."""
    if step.package is not None and importlib.util.find_spec(step.package) is None:
        return f"{step.package} is not installed"
    if step.program is not None and shutil.which(step.program) is None:
        return f"{step.program} is not installed"
    on_cpu = step.words[:3] == SAMEROUTE and step.name != "preset"
    if device == "cpu":
        return None if on_cpu else "it needs a GPU"
    return None if gpus >= step.gpus else f"it takes {step.gpus} GPUs, and there are {gpus}"


def here(out: Path) -> dict[str, Any]:
    """What a step's result is of: another of it, and the step is made again."""
    facts = host_facts(out)
    gpus = [f"{gpu['name']}, driver {gpu['driver_version']}" for gpu in facts["gpus"]]
    return {"gpus": gpus, "versions": facts["versions"], "git": facts["git"]}


def run_step(step: Step, out: Path) -> dict[str, Any]:
    """Its result: state passed or failed, why, figures, seconds. What it started is gone when this returns."""
    began, log, environment = time.monotonic(), out / f"{step.name}.log", dict(os.environ)
    if step.sees is not None:  # with more the engines would not share any
        own = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(step.sees)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own.split(",")[: step.sees])
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    result: dict[str, Any] = {"state": "failed", "figures": {}, "seconds": time.monotonic() - began, "log": log.name}
    try:
        if code is None:
            raise StepFailed(f"it took more than {step.limit_s:.0f} s")
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise StepFailed(f"exit code {code}: {said[-1]}")
        result["figures"] = step.figures(out)
    except (StepFailed, OSError, KeyError, ValueError) as error:
        return result | {"why": str(error)}
    return result | {"state": "passed"}


def page(results: dict[str, Any], steps: list[Step]) -> str:
    """Markdown: a table of the steps, and the figures of each."""
    lines = [
        "# The acceptance on this machine",
        "",
        "| step | what | result | date | seconds |",
        "|---|---|---|---|---|",
    ]
    for step in steps:
        found = results.get(step.name, {"state": "not run"})
        said = found["state"] + (f": {found['why']}" if "why" in found else "")
        seconds = f"{found['seconds']:.0f}" if "seconds" in found else ""
        lines.append(f"| {step.name} | {step.what} | {said} | {found.get('date', '')} | {seconds} |")
    for step in steps:
        found = results.get(step.name, {})
        if found.get("figures"):
            gpus = set(found["of"]["gpus"]) or {"no GPU"}
            lines += ["", f"## {step.name}", "", f"    {found['command']}", "", f"On {', '.join(sorted(gpus))}:", ""]
            rows = (f"| {key.replace('|', r'\|')} | {value:.4g} |" for key, value in found["figures"].items())
            lines += ["| | |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--again", nargs="+", metavar="STEP", default=[])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--address", help="HOST:PORT of a Ray cluster of two machines with four GPUs each")
    parser.add_argument("--preset", help="a configuration for this machine; its data and its model are yours to name")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the preset")
    options = parser.parse_intermixed_args(arguments)
    out = options.out.resolve()
    steps = steps_of(out, options.device, options.preset, options.overrides, options.address)
    names = [step.name for step in steps]
    if unknown := sorted({*(options.only or []), *options.again} - set(names)):
        parser.error(f"there is no step {', '.join(unknown)}; there are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    file, of = out / "acceptance.json", here(out)
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    chosen = [step for step in steps if options.only is None or step.name in options.only]
    for number, step in enumerate(chosen, 1):
        title, before = f"{number}/{len(chosen)} {step.name}", results.get(step.name, {})
        if step.name not in options.again and before.get("state") == "passed" and before.get("of") == of:
            print(f"{title}: passed on {before['date']}", flush=True)
            continue
        if (why := left_out(step, options.device, len(of["gpus"]))) is not None:
            results[step.name] = {"state": "left out", "why": why}
        else:
            print(f"{title}: {step.what}; {out / step.name}.log", flush=True)
            found = run_step(step, out)
            results[step.name] = found | {"of": of, "date": time.strftime("%Y-%m-%d"), "command": " ".join(step.words)}
        for path, text in ((file, json.dumps(results, indent=1) + "\n"), (out / "acceptance.md", page(results, steps))):
            unfinished = path.with_suffix(".partial")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        found = results[step.name]
        print(f"{title}: {found['state']}" + (f": {found['why']}" if "why" in found else ""), flush=True)
    states = [results[step.name]["state"] for step in chosen]
    return 1 if "failed" in states else 0 if "passed" in states else 2


if __name__ == "__main__":
    sys.exit(main())
