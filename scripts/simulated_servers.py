"""Servers that sample nothing: they speak SGLang's streaming /generate and answer at once, with answers of any size.

What they answer is shaped as an answer of a mixture of experts is: token ids, a log-prob of each, a row of routes of
every input token in the narrowest type, versions, text. An answer is made once for its lengths and then sent again and
again under other request ids, so that a server costs little more than the copy of its bytes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import orjson
from aiohttp import web

VERSION = 1
"""Of the weights that they say they hold."""


@dataclass(frozen=True)
class Shape:
    """Of the model whose answers these are; by default Qwen3-30B-A3B's."""

    num_layers: int = 48
    topk: int = 8
    num_experts: int = 128
    vocab_size: int = 151_936

    @property
    def moe_layers(self) -> list[int]:
        return list(range(self.num_layers))


@contextlib.contextmanager
def simulated_servers(count: int, shape: Shape, processes: int = 1) -> Iterator[list[str]]:
    """Their URLs. processes: that share them; they end with the block."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Any, Connection]] = []
    try:
        for number in range(min(processes, count)):
            here, there = context.Pipe()
            own = len(range(number, count, processes))
            process = context.Process(target=_serve, args=(there, own, shape), daemon=True)
            process.start()
            started.append((process, here))
        yield [f"http://127.0.0.1:{port}" for _, connection in started for port in connection.recv()]
    finally:
        for process, _ in started:
            process.terminate()
            process.join()


def _serve(connection: Connection, count: int, shape: Shape) -> None:
    async def run() -> None:
        sites, ports = [_runner(shape) for _ in range(count)], []
        for runner in sites:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            ports.append(runner.addresses[0][1])
        connection.send(ports)
        await asyncio.Event().wait()

    asyncio.run(run())


def _runner(shape: Shape) -> web.AppRunner:
    made = _Answers(shape)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/generate", made.generate)
    app.router.add_post("/abort_request", _nothing)
    app.router.add_post("/weights_checker", _nothing)
    app.router.add_get("/server_info", _info)
    app.router.add_get("/v1/loads", _loads)
    return web.AppRunner(app, access_log=None)


async def _nothing(_: web.Request) -> web.Response:
    return web.json_response({"success": True})


async def _info(_: web.Request) -> web.Response:
    return web.json_response({"enable_deterministic_inference": True})


async def _loads(_: web.Request) -> web.Response:
    room = {"max_running_requests": 1 << 20, "num_used_tokens": 0, "max_total_num_tokens": 1 << 30}
    return web.json_response({"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0, "timestamp": 0.0, **room}]})


class _Answers:
    def __init__(self, shape: Shape):
        self.shape = shape
        self._whole = functools.lru_cache(maxsize=64)(self._made)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """A piece of each sample after every so many tokens, the routes with the last, as SGLang sends them."""
        body = orjson.loads(await request.read())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for rid, ids, parameters in zip(body["rid"], body["input_ids"], body["sampling_params"], strict=True):
            rows = len(ids) - 1 - body["routed_experts_start_len"] if body["return_routed_experts"] else None
            for before, after in self._whole(parameters["max_new_tokens"], parameters["stream_interval"], rows):
                await response.write(b"".join((b"data: ", before, rid.encode(), after, b"\n\n")))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _made(self, tokens: int, interval: int, rows: int | None) -> list[tuple[bytes, bytes]]:
        """The JSON of an answer's pieces, before and after the request id. rows: of routes of tokens before it; None:
        none."""
        shape, rng = self.shape, np.random.default_rng(tokens)
        ids = rng.integers(0, shape.vocab_size, tokens).tolist()
        logprobs = (-rng.random(tokens, np.float32)).astype(float).tolist()
        pairs = [[value, token, None] for value, token in zip(logprobs, ids, strict=True)]
        pieces = []
        for start, end in itertools.pairwise([0, *range(interval, tokens, interval), tokens]):
            meta: dict[str, Any] = {
                "id": "RID",
                "finish_reason": None,
                "weight_versions": [{"version": str(VERSION), "start": 0, "end": end}],
                "num_retractions": 0,
                "completion_tokens": end,
                "output_token_logprobs": pairs[start:end],
            }
            if end == tokens:
                meta["finish_reason"] = {"type": "length", "length": tokens}
                if rows is not None:
                    meta["routed_experts"] = base64.b64encode(routes_of(shape, rows + tokens).tobytes()).decode()
            text = " abc" * (end - start)
            before, after = orjson.dumps({"text": text, "output_ids": ids[start:end], "meta_info": meta}).split(
                b'"RID"'
            )
            pieces.append((before + b'"', b'"' + after))
        return pieces


def routes_of(shape: Shape, rows: int) -> np.ndarray:
    """[rows, layers, topk] uint8: each row and layer names `topk` experts, none twice."""
    first = np.random.default_rng(rows).integers(0, shape.num_experts, (rows, shape.num_layers, 1))
    return ((first + 3 * np.arange(shape.topk)) % shape.num_experts).astype(np.uint8)
