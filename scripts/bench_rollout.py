"""Tokens a second of SGLang on the CPU: the batched attention backend against SGLang's torch_native.

    python scripts/bench_rollout.py [--rounds 8] [--new-tokens 16]

Both servers serve the same random 4-layer, hidden-64 Qwen3-MoE in float32; 32 prompts x 8 samples are in flight at
once, log-probs and routes come back. The two take turns, so that whatever else the machine does slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.config.model import TinyModelConfig
from pipeline.config.server import ServerConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.data.tokenizer import VOCAB_SIZE
from pipeline.engine.client import SGLangClient
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import CPU_ATTENTION_BACKEND, SGLangServer
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.types import Prompt

PROMPTS, SAMPLES, PROMPT_TOKENS = 32, 8, 12


def main() -> None:
    """Start both servers, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds of each backend")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of every answer")
    arguments = parser.parse_args()

    shape = TinyModelConfig(moe_intermediate=64)
    seconds: dict[str, list[float]] = {CPU_ATTENTION_BACKEND: [], "torch_native": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = make_tiny_model(Path(folder) / "model", shape, seed=0)
        clients = {}
        for backend in seconds:
            server = SGLangServer(
                ServerConfig(attention_backend=backend, context_length=1024),
                model,
                Path(folder) / f"{backend}.log",
                device="cpu",
                seed=0,
                return_routed_experts=True,
            )
            began = time.perf_counter()
            stack.enter_context(server)
            print(f"{backend}: ready after {time.perf_counter() - began:.1f} s", flush=True)
            clients[backend] = SGLangClient(
                server.url,
                keys=server.keys,
                vocab_size=VOCAB_SIZE,
                num_layers=shape.layers,
                topk=shape.topk,
                num_experts=shape.experts,
                log_path=server.log_path,
            )
        for round_number in range(arguments.rounds + 1):
            for backend, client in clients.items():
                elapsed = run_step(client, arguments.new_tokens, seed=round_number)
                if round_number > 0:  # the first one warms up
                    seconds[backend].append(elapsed)

    tokens = PROMPTS * SAMPLES * arguments.new_tokens
    print(f"\n{PROMPTS} prompts x {SAMPLES} samples x {arguments.new_tokens} tokens, {arguments.rounds} rounds each")
    for backend, values in seconds.items():
        median = statistics.median(values)
        print(f"{backend:>14}: {median:.3f} s median, {min(values):.3f} s best, {tokens / median:,.0f} tokens/s")
    ratio = statistics.median(n / b for b, n in zip(*seconds.values(), strict=True))
    print(f"{'ratio':>14}: {ratio:.2f} (median of the rounds)")


def run_step(client: SGLangClient, new_tokens: int, seed: int) -> float:
    """Seconds from the first request to the last decoded answer."""
    rng = np.random.default_rng(seed)
    prompts = [Prompt(rng.integers(0, VOCAB_SIZE, PROMPT_TOKENS), "") for _ in range(PROMPTS)]
    sampling = Sampling(max_new_tokens=new_tokens, temperature=1.0, ignore_eos=True)
    began = time.perf_counter()
    groups = sample_groups_sync(client, prompts, SAMPLES, sampling)
    elapsed = time.perf_counter() - began
    assert sum(len(r) for group in groups for r in group.rollouts) == PROMPTS * SAMPLES * new_tokens
    return elapsed


if __name__ == "__main__":
    main()
