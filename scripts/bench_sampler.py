"""Tokens a second of the sampler against a bare asynchronous HTTP client at the same server.

    python scripts/bench_sampler.py [--rounds 20] [--new-tokens 16]

The bare client posts the same requests with aiohttp and reads the answers' bytes; it decodes and checks nothing. A
second one posts the n samples of a prompt as one request, which ends when its longest sample ends. The server is
SGLang on the CPU with a random 4-layer, hidden-64 Qwen3-MoE; 32 prompts x 8 samples are in flight at once, log-probs
and routes come back. The three take turns, so that whatever else the machine does slows all.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pipeline import http
from pipeline.config.model import TinyModelConfig
from pipeline.config.server import ServerConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.data.tokenizer import VOCAB_SIZE
from pipeline.engine.client import SGLangClient
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.types import Prompt

PROMPTS, SAMPLES, PROMPT_TOKENS = 32, 8, 12


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds of each client")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of every answer")
    arguments = parser.parse_args()
    shape = TinyModelConfig(moe_intermediate=64)
    sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=1.0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", shape, seed=0)
        config = ServerConfig(context_length=1024)
        with SGLangServer(
            config, model, Path(folder) / "log", device="cpu", seed=0, return_routed_experts=True
        ) as server:
            client = SGLangClient(
                server.url,
                keys=server.keys,
                vocab_size=VOCAB_SIZE,
                num_layers=shape.layers,
                topk=shape.topk,
                num_experts=shape.experts,
            )
            seconds: dict[str, list[float]] = {"sampler": [], "bare client": [], "n in one request": []}
            for number in range(arguments.rounds + 1):
                rng = np.random.default_rng(number)
                prompts = [Prompt(rng.integers(0, VOCAB_SIZE, PROMPT_TOKENS), "") for _ in range(PROMPTS)]
                for name, values in seconds.items():
                    elapsed = run(name, client, prompts, sampling)
                    if number > 0:  # the first round warms up
                        values.append(elapsed)
    tokens = PROMPTS * SAMPLES * arguments.new_tokens
    bare = seconds["bare client"]
    print(f"{PROMPTS} prompts x {SAMPLES} samples x {arguments.new_tokens} tokens, {arguments.rounds} rounds each")
    for name, values in seconds.items():
        median, share = statistics.median(values), statistics.median(b / v for b, v in zip(bare, values, strict=True))
        print(f"{name:>16}: {median:.3f} s median, {tokens / median:,.0f} tokens/s, {share:.3f} of the bare client's")


def run(name: str, client: SGLangClient, prompts: list[Prompt], sampling: Sampling) -> float:
    """Seconds from the first request to the last answer, decoded where the sampler asks."""
    began = time.perf_counter()
    if name == "sampler":
        sample_groups_sync(client, prompts, SAMPLES, sampling)
    else:
        asyncio.run(post_all(client, prompts, sampling, together=name != "bare client"))
    return time.perf_counter() - began


async def post_all(client: SGLangClient, prompts: list[Prompt], sampling: Sampling, *, together: bool) -> None:
    """The requests of all prompts, by aiohttp alone. together: a prompt's samples in one request."""
    headers = http.bearer(client.keys.api if client.keys else None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def one(ids: Any) -> None:
            body = {
                "input_ids": ids,
                "sampling_params": sampling.parameters(),
                "return_logprob": True,
                "return_routed_experts": True,
            }
            async with session.post(f"{client.url}/generate", json=body, headers=headers) as response:
                assert response.status == 200
                await response.read()

        rows = [prompt.ids.tolist() for prompt in prompts]
        work = [[row] * SAMPLES for row in rows] if together else [row for row in rows for _ in range(SAMPLES)]
        await asyncio.gather(*(one(ids) for ids in work))


if __name__ == "__main__":
    main()
