"""Several servers as one: each group of samples goes to the server that has the fewest in flight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.engine.client import Sampling, SGLangClient
from pipeline.types import Rollout


class ClientPool:
    """Clients of servers that hold the same weights; used as one client is."""

    def __init__(self, clients: Sequence[SGLangClient]):
        self.clients = list(clients)
        self._in_flight = [0] * len(self.clients)
        self._entered: list[AsyncExitStack] = []

    async def __aenter__(self) -> Self:
        stack = AsyncExitStack()
        for client in self.clients:
            await stack.enter_async_context(client)
        self._entered.append(stack)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._entered.pop().aclose()

    async def generate(self, prompt_ids: Sequence[int] | np.ndarray, n: int, sampling: Sampling) -> list[Rollout]:
        """SGLangClient.generate of one of the servers; its samples share that server's prefix cache."""
        with self._least_busy(n) as client:
            return await client.generate(prompt_ids, n, sampling)

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """SGLangClient.score of one of the servers."""
        with self._least_busy(1) as client:
            return await client.score(token_ids)

    @contextmanager
    def _least_busy(self, samples: int) -> Iterator[SGLangClient]:
        chosen = self._in_flight.index(min(self._in_flight))
        self._in_flight[chosen] += samples
        try:
            yield self.clients[chosen]
        finally:
            self._in_flight[chosen] -= samples
