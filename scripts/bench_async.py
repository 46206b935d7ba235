"""Steps a second of the quickstart's task with rollouts in turn with the training, and beside it.

    .venv/bin/python scripts/bench_async.py [section.field=value ...] [--steps 20] [--staleness 0 1 4]
                                             [--lengths model 8-256]

One run of both engines for each of --lengths and `rollout.max_staleness`, in turn, from the same weights. With
`8-256` an answer has so many tokens, drawn log-uniformly by prompt and sample; with `model` it ends as the model says.

A core each: the trainer and Ray run on the first core that this process may use; the servers, and this process, which
samples and decodes, on the last, whatever max_staleness is. --cores any lets the kernel decide. A second table has the
processor seconds that each used in a step: beside training a step takes at least as long as the busier core works.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from pipeline.config import load_config
from pipeline.engine.fleet import Fleet
from pipeline.engine.server import SGLangServer
from pipeline.loop.asynchronous import asynchronous
from pipeline.loop.open_loop import open_loop
from pipeline.rollout import answers, sampler

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = ["supervised.steps=60", "checks.first_rollouts=0", "checks.probe_every=0"]
WARM, LAST = 5, 5
CORES = sorted(os.sched_getaffinity(0))  # before any run takes some away


OF_SAMPLE = sampler.of_sample


def draw_lengths(shortest: int, longest: int) -> None:
    """From now on answers are so long, whatever the model says."""

    def drawn(sampling, prompt, number):
        share = random.Random(f"{prompt.index} {number}").random()
        tokens = round(math.exp(math.log(shortest) + share * math.log(longest / shortest)))
        return replace(OF_SAMPLE(sampling, prompt, number), max_new_tokens=tokens, ignore_eos=True, stop_token_ids=())

    sampler.of_sample = answers.of_sample = drawn


def processes(fleet: Fleet) -> dict[str, list[psutil.Process]]:
    """All of a run, by whose core they belong on."""
    me = psutil.Process()
    everything = [me, *me.children(recursive=True)]
    heads = [psutil.Process(s.process.pid) for s in fleet.servers if isinstance(s.process, SGLangServer)]
    servers = [found for head in heads for found in (head, *head.children(recursive=True))]
    trainers = [p for p in everything if "TrainerRank" in p.name() or "TrainerRank" in " ".join(p.cmdline())]
    rest = [p for p in everything if p not in servers and p not in trainers and p != me]
    return {"servers": servers, "trainer": trainers, "controller": [me], "others": rest}


def a_core_each(found: dict[str, list[psutil.Process]]) -> None:
    """Every thread of the servers and of this process on the last core, of everything else on the first."""
    for name, members in found.items():
        for process in members:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {CORES[-1 if name in ("servers", "controller") else 0]})


def processor_seconds(found: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """Since they began."""
    times = {name: [p.cpu_times() for p in members if p.is_running()] for name, members in found.items()}
    return {name: sum(t.user + t.system for t in members) for name, members in times.items()}


def measure(staleness: int, steps: int, overrides: list[str], *, pin: bool) -> dict[str, float]:
    """Means over the steps of one run."""
    config = load_config(CONFIG, [*SETTINGS, f"rollout.max_staleness={staleness}", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        with open_loop(config, Path(folder), logs) as (loop, _), asynchronous(loop, WARM + steps + 9, None):
            rows, began, before, found = [], 0.0, {}, {}
            for number in range(1, WARM + steps + 1):
                if number == 2 and pin:  # whatever the first step started is there
                    a_core_each(processes(loop.fleet))
                if number == WARM + 1:
                    found = processes(loop.fleet)
                    before, began = processor_seconds(found), time.monotonic()
                rows.append(loop.step(number).metrics)
            seconds = (time.monotonic() - began) / steps
            after = processor_seconds(found)
        os.sched_setaffinity(0, CORES)
    rows = rows[WARM:]
    means = {
        key: statistics.fmean(row.get(key, 0.0) for row in rows)
        for key in ("rollout/lag_mean", "rollout/spanning_versions", "idle/trainer", "idle/servers",
                    "response/length_mean")
    }  # fmt: skip
    means["reward"] = statistics.fmean(row["reward/mean"] for row in rows[-LAST:])
    used = {f"cpu/{name}": (after[name] - before[name]) / steps for name in after}
    return {"seconds": seconds} | means | used


def lengths_of(text: str) -> str:
    """Raises ValueError for what is neither `model` nor two numbers, as argparse wants it."""
    if text != "model":
        _, _ = map(int, text.split("-"))
    return text


def overrides_of(lengths: str) -> list[str]:
    """Has answers be so long from now on, and says what the servers need for it."""
    if lengths == "model":
        sampler.of_sample = answers.of_sample = OF_SAMPLE
        return []
    shortest, longest = map(int, lengths.split("-"))
    draw_lengths(shortest, longest)
    return [
        f"rollout.max_new_tokens={longest}",
        f"server.context_length={longest + 64}",
        "server.max_total_tokens=131072",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps, after {WARM} that warm up")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--lengths", nargs="+", type=lengths_of, default=["model"], metavar="SHORTEST-LONGEST")
    parser.add_argument("--cores", choices=("each", "any"), default="each", help="who runs where")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    titles = ["lengths", "max_staleness", "steps a second", f"against {options.staleness[0]}", "lag",
              "of several versions", "trainer idle", "servers idle", "tokens an answer",
              f"reward, last {LAST}"]  # fmt: skip
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    runs = {}
    for lengths in options.lengths:
        overrides = [*overrides_of(lengths), *options.overrides]
        for staleness in options.staleness:
            found = measure(staleness, options.steps, overrides, pin=options.cores == "each")
            runs[lengths, staleness] = found
            first = runs[lengths, options.staleness[0]]["seconds"]
            cells = [
                lengths,
                str(staleness),
                f"{1 / found['seconds']:.2f}",
                f"{first / found['seconds']:.2f} times",
                f"{found['rollout/lag_mean']:.1f}",
                f"{found['rollout/spanning_versions']:.0%}",
                *(f"{found[key]:.0%}" if staleness else "" for key in ("idle/trainer", "idle/servers")),
                f"{found['response/length_mean']:.1f}",
                f"{found['reward']:.3f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    parts = [key for key in found if key.startswith("cpu/")]
    print(f"\nprocessor seconds a step\n\n| lengths | max_staleness | {' | '.join(parts).replace('cpu/', '')} |")
    print("|---" * (2 + len(parts)) + "|")
    for (lengths, staleness), found in runs.items():
        print(f"| {lengths} | {staleness} | {' | '.join(f'{found[key]:.3f}' for key in parts)} |")


if __name__ == "__main__":
    main()
