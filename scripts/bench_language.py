"""Tokens a second of server and trainer on a real language model and a CPU, beside what matrices and memory allow.

    make language-model
    .venv/bin/python scripts/bench_language.py models/SmolLM2-MoE-4x135M [--steps 2] [section.field=value ...]

The bounds are made of rates that this script measures first, with as many threads as the machine has cores: products
of [rows, hidden] and [hidden, 2 F] matrices, F the inner elements of an expert, for as many rows as an expert gets, and
reading memory.

    server   a step of B requests reads all weights that they meet once, and multiplies B tokens by the active ones
    trainer  6 FLOP a token and active weight, of which backward is two thirds; Adam moves 28 bytes a weight

Answers all have the same length; both engines, Ray, GSPO, replay and the transfer are those of `sameroute train`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.hf.description import ModelDescription, read_description
from pipeline.config import load_config
from pipeline.loop.open_loop import open_loop
from pipeline.plan import parameters

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PROMPTS, SAMPLES, ANSWER = 4, 8, 21
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
    "train.mini_batches=1",
    "train.decay_steps=null",
    "train.lr=1e-6",
    "trainer.micro_batch_tokens=1024",
    "checks.first_rollouts=0",
    "rewards={kind: number}",
]


@dataclass(frozen=True)
class Rates:
    """few, many: FLOP/s of float32 products with an expert's rows in a decoding step, and with a micro-batch's.
    memory: bytes/s that are read."""

    few: float
    many: float
    memory: float


def seconds(work: Callable[[], object], repeat: int = 9) -> float:
    """The median of one call."""
    work()
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measured_rates(model: ModelDescription, requests: int, tokens: int) -> Rates:
    """Of this machine, now."""
    share = model.topk / model.num_experts if model.num_experts else 1.0
    width = model.expert_ffn or model.ffn
    weight = torch.randn(2 * width, model.hidden)

    def product(rows: int) -> float:
        x = torch.randn(rows, model.hidden)
        return 2 * rows * weight.numel() / seconds(lambda: torch.nn.functional.linear(x, weight))

    block = torch.ones(1 << 27)  # half a GB, more than any cache holds
    read = block.nbytes / seconds(block.sum, repeat=3)
    return Rates(product(max(1, int(requests * share))), product(max(1, int(tokens * share))), read)


def bounds(model: ModelDescription, rates: Rates, requests: int, prompt: int, answer: int) -> tuple[float, float]:
    """Tokens a second that the server could sample, and that the trainer could train on (prompts included)."""
    total, active = parameters.total(model), parameters.active(model)
    met = total if model.num_experts else active  # of the experts, 32 requests meet all
    embedding = model.vocab_size * model.hidden
    step = max(4 * (met - embedding) / rates.memory, 2 * requests * (active - embedding) / rates.few)
    prefill = 2 * requests * prompt * (active - 2 * embedding) / rates.many
    sampled = requests * answer / (prefill + answer * step)
    tokens = requests * (prompt + answer)
    train = 6 * tokens * (active - embedding) / rates.many + 28 * total / rates.memory
    return sampled, tokens / train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that warms up")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    model, requests = read_description(options.model), PROMPTS * SAMPLES
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rates = measured_rates(model, requests, 1024)
    print(
        f"{torch.get_num_threads()} threads: {rates.few / 1e9:.0f} GFLOP/s with an expert's rows while sampling, "
        f"{rates.many / 1e9:.0f} with a micro-batch's, {rates.memory / 1e9:.1f} GB/s read"
    )
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        rows = (
            f'{{"prompt": "What is {i} + {i * i % 97}? Answer with a number only.", "answer": "{i + i * i % 97}"}}'
            for i in range(99)
        )
        prompts.write_text("\n".join(rows) + "\n")
        words = [w.replace("PATH", str(prompts)) for w in SETTINGS]
        config = load_config(CONFIG, [*words, f"model.path={options.model}", *options.overrides])
        logs = Path(folder) / "logs"
        logs.mkdir()
        steps, lengths = [], []
        with open_loop(config, Path(folder), logs) as (loop, _):
            loop.sampling = replace(loop.sampling, ignore_eos=True, stop_token_ids=())
            for number in range(1, options.steps + 2):
                result = loop.step(number)
                steps.append(result.metrics)
                lengths += [len(r.prompt_ids) for g in result.batch.groups for r in g.rollouts]
    steps, prompt = steps[1:], round(statistics.mean(lengths))
    sampled, trained = bounds(model, rates, requests, prompt, ANSWER)
    rollout, train, sync = (
        statistics.median(s[f"time/{phase}_s"] for s in steps) for phase in ("rollout", "train", "sync")
    )
    apart = max(s["mismatch/max_abs_logprob"] for s in steps)
    reached = requests * ANSWER / rollout, requests * (prompt + ANSWER) / train
    print(f"{requests} answers of {ANSWER} tokens to prompts of {prompt}; {len(steps)} steps")
    print(f"server   {reached[0]:8.1f} tokens/s  bound {sampled:8.1f}  {reached[0] / sampled:4.0%}  ({rollout:.2f} s)")
    print(f"trainer  {reached[1]:8.1f} tokens/s  bound {trained:8.1f}  {reached[1] / trained:4.0%}  ({train:.2f} s)")
    print(f"transfer {sync:.2f} s;  largest difference of the engines {apart:.1e} nats")


if __name__ == "__main__":
    main()
