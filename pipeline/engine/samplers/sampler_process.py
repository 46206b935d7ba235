"""A sampler process: a Ray actor beside its servers that asks them, decodes and checks what they answer.

The routes of an answer stay in the object store of the actor's node (`StoredRoutes`); the rest, some thirteen bytes a
token, is what the caller gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from pipeline.engine.client import SGLangClient
from pipeline.engine.sampling import Piece, Sampling

GATHER_S = 0.002
"""Requests come one by one from the controller: those of so many seconds share an HTTP request."""


@dataclass(frozen=True)
class Light:
    """An answer without its routes.

    content: of `SGLangClient.sample` or `score`. rows: shape of its routes. dtype: of these; None: it has none.
    wide: answers since the last one whose routes came as int32.
    """

    content: Any
    rows: tuple[int, int, int]
    dtype: np.dtype | None
    wide: int


@dataclass(frozen=True)
class Call:
    """number: of the call, for `give_up`. server: its place in the process. url, version: of the server and the weights
    that it holds, now. sampling, routes_from: as SGLangClient.sample takes them; None: it is to be scored."""

    number: int
    server: int
    url: str
    version: int
    token_ids: np.ndarray
    sampling: Sampling | None
    routes_from: int = 0


class SamplerProcess:
    """Runs in the actor, on one event loop. clients: of its servers."""

    def __init__(self, clients: Sequence[SGLangClient]):
        self._clients = list(clients)
        self._entered: set[int] = set()
        self._calls: dict[int, asyncio.Task[Any]] = {}
        self._moved: dict[int, list[Piece]] = {}

    @ray.method(num_returns=2)
    async def answer(self, packed: bytes) -> tuple[Light, np.ndarray | None]:
        """What a server says to a call, and its routes. packed: a pickled Call; Ray takes many times as long for one
        with arrays and classes in it. Raises what SGLangClient raises."""
        call: Call = pickle.loads(packed)
        client = self._clients[call.server]
        client.url, client.version, client.gather_s = call.url, call.version, GATHER_S
        if call.sampling is None:
            content, routes = await self._done(call, client.score(call.token_ids))
        else:

            def heard(piece: Piece) -> None:
                self._moved.setdefault(call.number, []).append(piece)

            work = client.sample(call.token_ids, call.sampling, routes_from=call.routes_from, on_tokens=heard)
            part = await self._done(call, work)
            content, routes = replace(part, routes=None), part.routes
        wide, client.decoder.wide_routes = client.decoder.wide_routes, 0
        if routes is None:
            return Light(content, (0, 0, 0), None, wide), None
        assert isinstance(routes, np.ndarray), "a client of this process decodes"
        rows, layers, topk = routes.shape
        return Light(content, (rows, layers, topk), routes.dtype, wide), routes

    async def moved(self) -> dict[int, list[Piece]]:
        """What the calls, by their numbers, got since this was last asked."""
        moved, self._moved = self._moved, {}
        return moved

    async def give_up(self, number: int) -> None:
        """Nobody waits for this call any more: its request is aborted."""
        if task := self._calls.get(number):
            task.cancel()

    async def _done[T](self, call: Call, work: Coroutine[Any, Any, T]) -> T:
        task = self._calls[call.number] = asyncio.ensure_future(self._inside(call.server, work))
        try:
            return await task
        finally:
            del self._calls[call.number]

    async def _inside[T](self, server: int, work: Coroutine[Any, Any, T]) -> T:
        if server not in self._entered:  # for good: it is left when the process ends
            self._entered.add(server)
            await self._clients[server].__aenter__()
        with contextlib.closing(work):
            return await work
