"""What a token costs the controller on its way from a server to a trainer rank, by the number of servers.

    python scripts/bench_road.py [--servers 1 4 16 64] [--steps 8] [--answers 64] [--tokens 2048] [--samplers 4]

The servers are simulated (`simulated_servers.py`): they speak the protocol, answer at once, and their answers are those
of Qwen3-30B-A3B: 48 layers x 8 experts a token, log-probs, versions. Each step samples groups of 8 from all servers,
reads the answers (a made-up tokenizer of as many ids, four letters a token) and grades them (`exact_match`), hands them
to a trainer rank (an actor, which reads every route), and forgets them. Every line is a process of its own.

tokens/s:        of all steps, by the clock; servers, rank and controller share the machine.
controller:      its processor time a token, all of its threads; a controller alone on its core does 1e6 / that.
grading:         of that, from sampled to graded.
bytes:           that reach the controller, a token: of HTTP, or of what samplers and graders send.
RSS:             of the controller after the first step and after the last, without pages that it shares.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pickle
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from simulated_servers import Shape, simulated_servers
from tokenizers import Tokenizer, decoders, models

from pipeline.cluster.ray_session import ray_session
from pipeline.config.rewards import ExactMatchReward, GradingConfig
from pipeline.config.run import ClusterConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.engine.client import SGLangClient
from pipeline.engine.fleet import Fleet, FleetServer
from pipeline.engine.samplers.stored_client import through_samplers
from pipeline.engine.sampling import Sampling
from pipeline.rewards import grade
from pipeline.rollout.grading import Graders, Grading, OwnGraders
from pipeline.rollout.remote_grading import remote_graders
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.trainer.group import to_sample
from pipeline.types import Prompt

ROADS = ("in-process", "samplers")
SAMPLES, PROMPT_TOKENS = 8, 128


def main() -> None:
    """Measure each road with each number of servers, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--answers", type=int, default=64, help="of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="of an answer")
    parser.add_argument("--processes", type=int, default=1, help="that the servers share")
    parser.add_argument("--samplers", type=int, default=4, help="processes that decode, at most one a server")
    parser.add_argument("--measure", nargs=2, metavar=("ROAD", "SERVERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure[0], int(options.measure[1]), options)))
        return
    print(f"{options.steps} steps of {options.answers} answers of {options.tokens} tokens", flush=True)
    print(
        "| road | servers | tokens/s | controller, us a token | grading | bytes a token | RSS, MB: first, last step |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for servers in options.servers:
        for road in ROADS:
            own = [sys.executable, __file__, *sys.argv[1:], "--measure", road, str(servers)]
            done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
            m = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {road} | {servers} | {m['tokens_per_s']:,.0f} | {m['cpu_us']:.2f} | {m['grading_us']:.2f} | "
                f"{m['bytes']:.0f} | {m['rss'][0]:.0f}, {m['rss'][-1]:.0f} |",
                flush=True,
            )


class Rank:
    """What a trainer rank does with samples: it reads them all."""

    def load(self, samples: list[Any]) -> int:
        """Route bytes read, each of them looked at."""
        routes = [np.asarray(sample.routes) for sample in samples]
        assert all(int(own.max()) < Shape.num_experts for own in routes)
        return sum(own.nbytes for own in routes)


class Counting(SGLangClient):
    """Counts the bytes that come."""

    received = 0

    async def _chunks(self, body: dict[str, Any]):
        async for chunk in super()._chunks(body):
            Counting.received += len(chunk)
            yield chunk


class Simulated:
    """A ServerProcess that somebody else started."""

    log_path, keys = Path("none"), None

    def __init__(self, url: str):
        self.url = url

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """It is."""

    def alive(self) -> bool:
        """It does not end."""
        return True

    def stop(self) -> None:
        """Whoever started it does that."""

    def send_weights(self, *_: Any, **__: Any) -> None:
        """As a trainer: the servers' weights need not come."""


def client_of(url: str, shape: Shape, kind: type[SGLangClient]) -> SGLangClient:
    """Of a server."""
    sizes = {"num_layers": shape.num_layers, "topk": shape.topk, "num_experts": shape.num_experts}
    return kind(url, vocab_size=shape.vocab_size, **sizes)


def write_tokenizer_of(directory: Path, size: int) -> None:
    """So many made-up tokens, of four letters each."""
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    vocabulary = {"".join(word): number for number, word in enumerate(itertools.islice(letters, size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@contextlib.contextmanager
def grading_of(road: str) -> Iterator[Grading]:
    """What grades, as a run has it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_tokenizer_of(Path(folder), Shape.vocab_size)
        if road == "in-process":
            graders: Graders = OwnGraders(load_tokenizer(folder))
        else:
            graders = stack.enter_context(remote_graders([None], Path(folder), False))
        yield stack.enter_context(graders.open((ExactMatchReward(),), GradingConfig()))


@contextlib.contextmanager
def fleet_of(road: str, urls: Sequence[str], shape: Shape, samplers: int) -> Iterator[Fleet]:
    """The servers as a run has them."""
    own = [client_of(url, shape, Counting if road == "in-process" else SGLangClient) for url in urls]
    with through_samplers(own, 0 if road == "in-process" else samplers, [None] * len(own)) as clients:
        fleet = Fleet([FleetServer(Simulated(c.url), c) for c in clients])
        fleet.wait_ready()
        fleet.transfer(Simulated(""))
        yield fleet


def measured(road: str, servers: int, options: argparse.Namespace) -> dict[str, Any]:
    """tokens_per_s, cpu_us, grading_us and bytes a token, rss in MB by step; the first step warms up."""
    shape, sampling = Shape(), Sampling(max_new_tokens=options.tokens, temperature=1.0, ignore_eos=True)
    row = shape.num_layers * shape.topk
    store = 3 * options.answers * (options.tokens + PROMPT_TOKENS) * row / 1e9 + 0.2
    rng, cpu, grading_cpu, seconds, rss = np.random.default_rng(0), 0.0, 0.0, 0.0, []
    with (
        simulated_servers(servers, shape, options.processes) as urls,
        ray_session(ClusterConfig(object_store_gb=store), cpus=2),
        fleet_of(road, urls, shape, min(servers, options.samplers)) as fleet,
        grading_of(road) as grading,
    ):
        rank: Any = ray.remote(Rank).remote()
        for step in range(options.steps + 1):
            prompts = [
                Prompt(rng.integers(0, shape.vocab_size, PROMPT_TOKENS, np.int32), "", {"answer": "12"}, index=i)
                for i in range(options.answers // SAMPLES)
            ]
            began, busy = time.perf_counter(), time.process_time()
            groups = sample_groups_sync(fleet, prompts, SAMPLES, sampling)
            sampled = time.process_time()
            groups, failures = grade(groups, grading)
            graded = time.process_time() - sampled
            assert not failures.first, failures
            samples = [to_sample(rollout) for group in groups for rollout in group.rollouts]
            read = ray.get(rank.load.remote(ray.put(samples)))
            assert read == options.answers * (PROMPT_TOKENS + options.tokens - 1) * row
            busy, began = time.process_time() - busy, time.perf_counter() - began
            if road != "in-process":
                episodes = [episode for group in groups for episode in group.episodes]
                light = [replace(e, rollouts=tuple(replace(r, routes=None) for r in e.rollouts)) for e in episodes]
                Counting.received += sum(len(pickle.dumps(episode)) for episode in light)
                del episodes, light
            del groups, samples
            if step:
                cpu, grading_cpu, seconds = cpu + busy, grading_cpu + graded, seconds + began
                memory = psutil.Process().memory_info()
                rss.append((memory.rss - memory.shared) / 1e6)
            else:  # it warms up
                Counting.received = 0
    tokens = options.steps * options.answers * options.tokens
    return {
        "tokens_per_s": tokens / seconds,
        "cpu_us": 1e6 * cpu / tokens,
        "grading_us": 1e6 * grading_cpu / tokens,
        "bytes": Counting.received / tokens,
        "rss": rss,
    }


if __name__ == "__main__":
    main()
