"""Tokens a second of server and trainer on a real language model and a CPU, beside what matrices and memory allow.

    make language-model
    .venv/bin/python scripts/bench_language.py models/SmolLM2-MoE-4x135M [--parts server trainer step]

The bounds are made of rates that this script measures first, with as many threads as the machine has cores: products
of [rows, hidden] and [hidden, 2 F] matrices, F the inner elements of an expert, for as many rows as an expert gets;
reading memory; and adding to it.

    prefill    2 FLOP a prompt's token and active weight
    decode     a step reads all weights that its requests meet once, and multiplies their tokens by the active ones
    log-probs  2 FLOP a token and active weight, the LM head for tokens of answers alone
    update     6 FLOP likewise, and by weight 48 bytes: the gradient is cleared, added to, measured and clipped (20),
               and Adam reads four numbers and writes three (28)

Parts: `server` (SGLang alone), `trainer` (one rank, without Ray, in this process), one after the other; `step` is
whole steps as `sameroute train` makes them, Ray, GSPO, replay and the transfer included, with both engines in memory
(16 GB). Answers all have the same length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.hf.description import ModelDescription, read_description
from pipeline.config import Config, load_config
from pipeline.plan.counts import parameters

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PROMPTS, SAMPLES, ANSWER = 4, 8, 21
REQUESTS = PROMPTS * SAMPLES
ROWS = 1024  # tokens of a micro-batch
SETTINGS = [
    "model.tiny=null",
    "data.task=null",
    "data.path=PATH",
    "data.max_prompt_tokens=80",
    "supervised.steps=0",
    "supervised.decay_steps=null",
    f"rollout.prompts_per_step={PROMPTS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    f"rollout.max_new_tokens={ANSWER}",
    "server.context_length=128",
    "server.prefix_cache=true",
    "train.mini_batches=1",
    "train.decay_steps=null",
    "train.lr=1e-6",
    f"trainer.micro_batch_tokens={ROWS}",
    "checks.first_rollouts=0",
    "rewards={kind: number}",
]


@dataclass(frozen=True)
class Rates:
    """few, many: FLOP/s of float32 products with an expert's rows in a decoding step, and with a micro-batch's.
    read, added: bytes/s that are read, and that a sum of two tensors, written over the first, moves."""

    few: float
    many: float
    read: float
    added: float


@dataclass(frozen=True)
class Phase:
    """tokens: that it is done with after so many seconds. bound: seconds."""

    name: str
    tokens: int
    seconds: float
    bound: float

    def __str__(self) -> str:
        rate = self.tokens / self.seconds
        share = f"{self.bound / self.seconds:4.0%}"
        return (
            f"{self.name:10}{self.seconds:8.2f} s{rate:10.1f} tokens/s  bound{self.tokens / self.bound:10.1f}  {share}"
        )


def seconds(work: Callable[[], object], repeat: int = 9) -> float:
    """Of the fastest call: what the machine allows where nothing else is on it."""
    work()
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def measured_rates(model: ModelDescription) -> Rates:
    """Of this machine, now."""
    share = model.topk / model.num_experts if model.num_experts else 1.0
    width = model.expert_ffn or model.ffn
    weight = torch.randn(2 * width, model.hidden)

    def product(rows: int) -> float:
        x = torch.randn(rows, model.hidden)
        return 2 * rows * weight.numel() / seconds(lambda: torch.nn.functional.linear(x, weight), 25)

    block, other = torch.ones(1 << 26), torch.ones(1 << 26)  # a quarter of a GB each, more than a cache holds
    read = block.nbytes / seconds(block.sum, repeat=5)
    added = 3 * block.nbytes / seconds(lambda: block.add_(other), repeat=5)
    return Rates(product(max(1, int(REQUESTS * share))), product(max(1, int(ROWS * share))), read, added)


class Bounds:
    """Seconds that rates allow. prompt: tokens of one."""

    def __init__(self, model: ModelDescription, rates: Rates, prompt: int):
        self.rates, self.prompt, self.total = rates, prompt, parameters.total(model)
        self.head = model.vocab_size * model.hidden
        self.inner = parameters.active(model) - 2 * self.head  # a dense model's, if tied, counts its head once
        if model.tied_embeddings:
            self.inner += self.head
        self.met = self.total - self.head * (not model.tied_embeddings)  # of the experts, 32 requests meet all

    def prefill(self) -> float:
        """Of each prompt once, and of one row of logits for each answer."""
        return 2 * (PROMPTS * self.prompt * self.inner + REQUESTS * self.head) / self.rates.many

    def decode(self) -> float:
        """Of one step."""
        multiplied = 2 * REQUESTS * (self.inner + self.head) / self.rates.few
        return max(4 * self.met / self.rates.read, multiplied)

    def _products(self, passes: int) -> float:
        tokens = REQUESTS * (self.prompt + ANSWER)
        return 2 * passes * (tokens * self.inner + REQUESTS * ANSWER * self.head) / self.rates.many

    def logprobs(self) -> float:
        return self._products(1)

    def update(self) -> float:
        return self._products(3) + 48 * self.total / self.rates.added


def configuration(model: Path, folder: Path, overrides: list[str]) -> Config:
    """Of a run on sums, which no answer will be graded by."""
    file = folder / "prompts.jsonl"
    sums = ((i, i * i % 97) for i in range(99))
    rows = (f'{{"prompt": "What is {a} + {b}? Answer with a number only.", "answer": "{a + b}"}}' for a, b in sums)
    file.write_text("\n".join(rows) + "\n")
    words = [word.replace("PATH", str(file)) for word in SETTINGS]
    return load_config(CONFIG, [*words, f"model.path={model}", f"run.directory={folder}/run", *overrides])


def of_server(config: Config, model: ModelDescription, path: Path, logs: Path, repeat: int) -> tuple[float, float, int]:
    """Median seconds of the first token of all answers, and of each further one; tokens of a prompt."""
    from pipeline.engine.sampling import Sampling
    from pipeline.loop.engines import start_servers
    from pipeline.loop.inputs import prompt_source
    from pipeline.rollout.sampler import sample_groups_sync

    source = prompt_source(config, path)
    first, whole, lengths = [], [], []
    with start_servers(config, path, model, logs) as fleet:
        for number in range(repeat + 1):
            for tokens, taken in ((1, first), (ANSWER, whole)):
                prompts = source.take(PROMPTS)
                for server in fleet.servers:  # as after an update: not even the template is cached
                    server.client.post("/flush_cache", {})
                lengths += [len(p.ids) for p in prompts]
                began = time.perf_counter()
                sample_groups_sync(fleet, prompts, SAMPLES, Sampling(tokens, temperature=1.0, ignore_eos=True))
                taken += [time.perf_counter() - began] if number else []
    prefill = statistics.median(first)
    return prefill, (statistics.median(whole) - prefill) / (ANSWER - 1), round(statistics.mean(lengths))


def random_samples(model: ModelDescription, prompt: int) -> list[Sample]:
    """As many as a step has, with routes."""
    rng = np.random.default_rng(0)

    def routes() -> np.ndarray | None:
        if not model.num_experts:
            return None
        chances = rng.random((prompt + ANSWER - 1, model.num_layers, model.num_experts))
        return chances.argsort(-1)[..., : model.topk].astype(np.int16)

    tokens = rng.integers(3, model.vocab_size, (REQUESTS, prompt + ANSWER)).astype(np.int32)
    return [Sample(row, prompt, routes=routes()) for row in tokens]


def of_trainer(model: ModelDescription, path: Path, prompt: int, repeat: int) -> tuple[float, float]:
    """Median seconds of a pass for log-probs, and of an update, replaying routes."""
    from megatron_ext import parallel
    from megatron_ext.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        parallel.initialize(ParallelConfig(), rank=0, init_method=f"file://{folder}/meeting")
    trainer = Trainer(
        path, ParallelConfig(), TrainerConfig(micro_batch_tokens=ROWS), OptimizerConfig(lr=1e-6), replay=True
    )
    samples = random_samples(model, prompt)

    def loss(batch):
        return -(batch.quantities[0] * batch.mask).sum() / (REQUESTS * ANSWER), {}

    taken: list[tuple[float, float]] = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        trainer.logprobs(samples)
        between = time.perf_counter()
        trainer.update(samples, loss)
        taken.append((between - began, time.perf_counter() - between))
    parallel.shutdown()
    logprobs, update = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return logprobs, update


def whole_steps(config: Config, folder: Path, logs: Path, steps: int) -> Iterator[str]:
    """Medians of the phases, without bounds."""
    from pipeline.loop.open_loop import open_loop

    found = []
    with open_loop(config, folder, logs) as (loop, _):
        loop.sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
        for number in range(1, steps + 2):
            found.append(loop.step(number).metrics)
    found = found[1:]
    for phase in ("rollout", "train", "sync"):
        yield f"{phase:10}{statistics.median(step[f'time/{phase}_s'] for step in found):8.2f} s"
    yield f"largest difference of the engines {max(s['mismatch/max_abs_logprob'] for s in found):.1e} nats"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--parts", nargs="+", choices=["server", "trainer", "step"], default=["server", "trainer"])
    parser.add_argument("--repeat", type=int, default=3, help="times that each is measured, after once to warm up")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt where no server has been asked")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", dest="overrides")
    options = parser.parse_args()
    model, prompt = read_description(options.model), options.prompt
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rates = measured_rates(model)
    print(
        f"{torch.get_num_threads()} threads: {rates.few / 1e9:.0f} GFLOP/s with an expert's rows while sampling, "
        f"{rates.many / 1e9:.0f} with a micro-batch's; {rates.read / 1e9:.1f} GB/s read, {rates.added / 1e9:.1f} added",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = folder / "logs"
        logs.mkdir()
        config = configuration(options.model, folder, options.overrides)
        if "server" in options.parts:
            prefill, decode, prompt = of_server(config, model, options.model, logs, options.repeat)
            bounds = Bounds(model, rates, prompt)
            print(f"{REQUESTS} answers of {ANSWER} tokens to {PROMPTS} prompts of {prompt}")
            print(Phase("prefill", PROMPTS * prompt, prefill, bounds.prefill()))
            print(Phase("decode", REQUESTS, decode, bounds.decode()))
            own, bound = (p + d * (ANSWER - 1) for p, d in ((prefill, decode), (bounds.prefill(), bounds.decode())))
            print(Phase("server", REQUESTS * ANSWER, own, bound), flush=True)
        if "trainer" in options.parts:
            logprobs, update = of_trainer(model, options.model, prompt, options.repeat)
            tokens, bounds = REQUESTS * (prompt + ANSWER), Bounds(model, rates, prompt)
            print(Phase("log-probs", tokens, logprobs, bounds.logprobs()))
            print(Phase("update", tokens, update, bounds.update()))
            print(Phase("trainer", tokens, logprobs + update, bounds.logprobs() + bounds.update()), flush=True)
        if "step" in options.parts:
            print(*whole_steps(config, folder, logs, options.repeat), sep="\n")


if __name__ == "__main__":
    main()
