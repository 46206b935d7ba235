"""Where the processor's seconds of an RL step go: which process works at what, from outside, by py-spy.

    .venv/bin/python -m scripts.profile_step [--steps 40] [--lines 8] [section.field=value ...]

The step is that of bench_step.py. After the steps that warm up, py-spy looks 200 times a second at the scheduler of the
server, its process for HTTP, the trainer rank and the controller, and counts the threads that run. Printed are
milliseconds of a processor a step, by what a process works at: the first row of WORK with a name that the stack has;
with --lines, the functions too in which most of that is spent. A process that is looked at is a little slower.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil

from pipeline.config import load_config
from pipeline.engine.fleet import Fleet
from pipeline.loop.open_loop import open_loop
from scripts.bench_async import processes
from scripts.bench_step import CONFIG, SETTINGS

WARM, HERTZ = 5, 200
WORK = {
    "scheduler": (
        ("the model", ("forward_extend", "forward_decode", "model_runner.py", "forward_batch_generation")),
        ("tokens and log-probs of its results", ("process_batch_result", "stream_output")),
        ("requests that come", ("ingest_requests", "recv_requests", "process_input_requests")),
        ("batches", ("get_next_batch_to_run", "run_batch", "prepare_for_decode")),
        ("new weights", ("update_weights", "weight_updater")),
    ),
    "HTTP": (
        ("requests", ("generate_request", "_send_one_request", "_tokenize")),
        ("answers", ("handle_loop", "_handle_batch_output", "stream_results", "_wait_one_response")),
        ("HTTP", ("uvicorn", "starlette", "fastapi")),
    ),
    "trainer": (
        ("backward", ("backward_step",)),
        ("loss", ("finish", "policy_loss")),
        ("forward", ("forward_step",)),
        ("micro-batches", ("micro_batches", "make_micro_batch")),
        ("clipping and Adam", ("optimizer.py", "distrib_optimizer.py", "clip_grads.py")),
        ("weights to the servers", ("send_weights",)),
        ("what the step answers", ("update_policy", "measure", "load")),
    ),
    "controller": (
        ("requests and answers", ("sample_groups", "_together", "asyncio")),
        ("rewards", ("grade",)),
        ("advantages, rows, metrics", ("loss_rows", "compare", "batch_metrics", "routing_metrics")),
        ("calls of ranks", ("trainer/group.py", "trainer/waits.py", "ray/")),
        ("weights", ("weights/", "transfer")),
    ),
}


def watched(fleet: Fleet) -> dict[str, list[int]]:
    """Kind -> process ids."""
    found = processes(fleet)
    titles = {p.pid: " ".join(p.cmdline()) for p in found["servers"]}
    schedulers = [pid for pid, title in titles.items() if "scheduler" in title]
    return {
        "scheduler": schedulers,
        "HTTP": [pid for pid, title in titles.items() if pid not in schedulers and "detokenizer" not in title],
        "trainer": [p.pid for p in found["trainer"]],
        "controller": [psutil.Process().pid],
    }


def looks(folder: Path, pids: dict[str, list[int]]) -> list[tuple[str, Path, subprocess.Popen[bytes]]]:
    """py-spy at each, until it is interrupted."""
    begun = []
    tool = Path(sys.executable).parent / "py-spy"
    for kind, pid in ((kind, pid) for kind, own in pids.items() for pid in own):
        out = folder / f"{pid}.txt"
        command = [tool, "record", "--format", "raw", "--rate", str(HERTZ), "--duration", "100000", "--output", out]
        command += ["--nonblocking", "--pid", str(pid)]
        begun.append((kind, out, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
    return begun


def work_of(kind: str, stack: str) -> str:
    return next((work for work, names in WORK[kind] if any(name in stack for name in names)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lines", type=int, default=0, help="functions of each work that are shown")
    parser.add_argument("--keep", type=Path, help="a folder for the stacks, one a line with how often it was seen")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    config = load_config(CONFIG, SETTINGS + options.overrides)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "logs").mkdir()
        with open_loop(config, folder, folder / "logs") as (loop, _):
            loop.sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
            for number in range(1, WARM + 1):
                loop.step(number)
            begun = looks(folder, watched(loop.fleet))
            time.sleep(1)  # it reads symbols first
            began = time.monotonic()
            for number in range(WARM + 1, WARM + options.steps + 1):
                loop.step(number)
            seconds = (time.monotonic() - began) / options.steps
            for _, _, process in begun:
                process.send_signal(2)
                process.wait()
        print(f"{seconds:.3f} s a step\n\n| process | works at | ms of a processor a step |\n|---|---|---|")
        for kind in WORK:
            if options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                texts = [out.read_text() for own, out, _ in begun if own == kind and out.exists()]
                (options.keep / f"{kind}.txt").write_text("".join(texts))
            total, inside = Counter[str](), dict[str, Counter[str]]()
            for _, out, _ in (each for each in begun if each[0] == kind and each[1].exists()):
                for line in out.read_text().splitlines():
                    stack, _, count = line.rpartition(" ")
                    work = work_of(kind, stack)
                    total[work] += int(count)
                    inside.setdefault(work, Counter())[stack.rpartition(";")[2]] += int(count)
            for work, count in total.most_common():
                print(f"| {kind} | {work} | {1e3 * count / HERTZ / options.steps:.0f} |")
                for name, own in inside[work].most_common(options.lines):
                    print(f"| | {name} | {1e3 * own / HERTZ / options.steps:.1f} |", flush=True)


if __name__ == "__main__":
    main()
