"""All servers of a run as one: who is up, which version of the weights they hold, and who gets the next request.

The fleet owns the version. It is the number of transfers so far: every transfer gets the next one, and no number comes
twice in a run, resumptions included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from pipeline.engine.client import Sampling, SGLangClient
from pipeline.engine.control import ServerAddress
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError
from pipeline.types import Sampled


class ServerProcess(Protocol):
    """A started server, here (SGLangServer) or on another node (RemoteServer)."""

    @property
    def url(self) -> str: ...
    @property
    def log_path(self) -> Path: ...
    @property
    def keys(self) -> ServerKeys: ...
    def wait_ready(self, timeout_s: float | None = None) -> None: ...
    def alive(self) -> bool: ...
    def log_tail(self) -> str: ...


class WeightSource(Protocol):
    """Whoever holds the trained weights and is connected to the fleet's servers."""

    def send_weights(self, version: int) -> None: ...


class ServerState(Enum):
    """starting: it loads. serving: it gets requests. lost: its process ended."""

    STARTING = "starting"
    SERVING = "serving"
    LOST = "lost"


@dataclass(eq=False)
class FleetServer:
    """One server. client: its HTTP interface, for sampling and for control. in_flight: samples that it works on, and
    groups: how many of each group."""

    process: ServerProcess
    client: SGLangClient
    state: ServerState = field(default=ServerState.STARTING, init=False)
    in_flight: int = field(default=0, init=False)
    groups: Counter[object] = field(default_factory=Counter, init=False)

    @property
    def address(self) -> ServerAddress:
        """What another process needs to reach it."""
        return ServerAddress(self.process.url, self.process.log_path, self.process.keys)


class Fleet:
    """Servers that hold the same weights, used as one client is. Without servers it only counts versions."""

    def __init__(self, servers: Sequence[FleetServer] = ()):
        """servers: started; `wait_ready` before the first request."""
        self.servers = list(servers)
        self._version = 0
        self._entered: list[AsyncExitStack] = []

    @property
    def serves(self) -> bool:
        """Whether there are servers."""
        return bool(self.servers)

    @property
    def version(self) -> int:
        """Of the weights that the servers hold."""
        return self._version

    def begin_at(self, version: int) -> None:
        """A resumed run: its servers start with other weights, and the next transfer brings back this version."""
        self._version = version - 1

    def adopt(self, version: int) -> None:
        """A dumped step is replayed: it was sampled under this version. There are no servers that could differ."""
        assert not self.serves, "servers hold what was sent to them"
        self._version = version

    def transfer(self, trainers: WeightSource) -> None:
        """The trainer's weights to every server, under the next version; without servers only the version moves.

        Raises TrainerError where a rank or a server does not take part.
        """
        self._version += 1  # before: servers that fail half-way hold neither the old weights nor the new
        if self.serves:
            trainers.send_weights(self._version)
        for server in self.servers:
            server.client.version = self._version

    def wait_ready(self) -> None:
        """Block until every server answers. Raises ServerError with the end of the log of one that does not."""
        for server in self.servers:
            server.process.wait_ready()
            server.state = ServerState.SERVING

    def check_alive(self) -> None:
        """Raise ServerError, with the end of its log, for a server whose process has ended."""
        for server in self.servers:
            if not server.process.alive():
                server.state = ServerState.LOST
                raise ServerError(f"the SGLang server died\n{server.process.log_tail()}")

    @property
    def addresses(self) -> list[ServerAddress]:
        """Of every server."""
        return [server.address for server in self.servers]

    async def __aenter__(self) -> Self:
        """Sampling calls belong inside; may be nested."""
        stack = AsyncExitStack()
        for server in self.servers:
            await stack.enter_async_context(server.client)
        self._entered.append(stack)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._entered.pop().aclose()

    async def sample(
        self, token_ids: Sequence[int] | np.ndarray, sampling: Sampling, *, routes_from: int = 0, group: object = None
    ) -> Sampled:
        """SGLangClient.sample of one of the servers: the one that works on samples of this group, else the one with the
        fewest in flight. group: None belongs to none."""
        with self._chosen(group) as client:
            return await client.sample(token_ids, sampling, routes_from=routes_from)

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """SGLangClient.score of one of the servers."""
        with self._chosen(None) as client:
            return await client.score(token_ids)

    @contextmanager
    def _chosen(self, group: object) -> Iterator[SGLangClient]:
        """Raises ServerError where no server is serving."""
        serving = [server for server in self.servers if server.state is ServerState.SERVING]
        if not serving:
            states = ", ".join(server.state.value for server in self.servers) or "there are none"
            raise ServerError(f"no server takes requests: {states}")
        chosen = min(serving, key=lambda server: (not server.groups[group], server.in_flight))
        chosen.groups[group] += group is not None
        chosen.in_flight += 1
        try:
            yield chosen.client
        finally:
            chosen.in_flight -= 1
            chosen.groups[group] -= group is not None
            if not chosen.groups[group]:
                del chosen.groups[group]
