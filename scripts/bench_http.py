"""Seconds and client's CPU time of a rollout: aiohttp, which the client uses, against httpx, on one server in turns.

    python scripts/bench_http.py [--rounds 40] [--new-tokens 16]

The work is that of bench_rollout.py. Without proxies, connection limits and certificates on both sides.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from bench_rollout import PROMPTS, SAMPLES, run_step

from pipeline import http
from pipeline.config.model import TinyModelConfig
from pipeline.config.server import ServerConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.data.tokenizer import VOCAB_SIZE
from pipeline.engine.client import SGLangClient
from pipeline.engine.server import SGLangServer


class HttpxClient(SGLangClient):
    """The same over httpx."""

    async def __aenter__(self):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._httpx = httpx.AsyncClient(trust_env=False, verify=False, timeout=self.timeout_s, limits=limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._httpx.aclose()

    async def _post_generate(self, body: dict[str, Any]) -> Any:
        answer = await self._httpx.post(f"{self.url}/generate", json=body, headers=http.bearer(self._key("/generate")))
        return answer.raise_for_status().json()


def main() -> None:
    """Start the server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds of each")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of every answer")
    options = parser.parse_args()
    shape = TinyModelConfig(moe_intermediate=64)
    seconds: dict[type[SGLangClient], list[float]] = {SGLangClient: [], HttpxClient: []}
    cpu: dict[type[SGLangClient], list[float]] = {SGLangClient: [], HttpxClient: []}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", shape, seed=0)
        config, log = ServerConfig(context_length=1024), Path(folder) / "sglang.log"
        with SGLangServer(config, model, log, device="cpu", seed=0, return_routed_experts=True) as server:
            sizes = {"num_layers": shape.layers, "topk": shape.topk, "num_experts": shape.experts}
            clients = [kind(server.url, keys=server.keys, vocab_size=VOCAB_SIZE, **sizes) for kind in seconds]
            for number in range(options.rounds + 1):
                for client in clients if number % 2 else reversed(clients):
                    began = time.process_time()
                    elapsed = run_step(client, options.new_tokens, seed=number)
                    if number > 0:  # the first one warms up
                        seconds[type(client)].append(elapsed)
                        cpu[type(client)].append(time.process_time() - began)
    print(f"{PROMPTS} prompts x {SAMPLES} samples x {options.new_tokens} tokens, {options.rounds} rounds each")
    for kind, values in seconds.items():
        busy = statistics.median(cpu[kind])
        print(
            f"{kind.__name__:>14}: {statistics.median(values):.3f} s median, {min(values):.3f} s best, {busy:.3f} s CPU"
        )
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"{'ratio':>14}: {ratio:.2f} (median of the rounds)")


if __name__ == "__main__":
    main()
