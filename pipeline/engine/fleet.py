"""All servers of a run as one: which version of the weights they hold, and who gets the next request.

The fleet owns the version. It is the number of transfers so far: every transfer gets the next one, and no number comes
twice in a run, resumptions included.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.cluster.colocation import Apart, ServerPart, Turns
from pipeline.config.run import InterruptMode
from pipeline.config.server import ServerConfig
from pipeline.engine.client import AbortedError, SGLangClient
from pipeline.engine.control import ServerAddress, Transfer, UnreachableError
from pipeline.engine.decoder import AnswerError
from pipeline.engine.interruption import Told, Updates, given_up, let_requests_go_on, must_be_current, stop_requests
from pipeline.engine.membership import FleetServer, Membership, ServerProcess, ServerState
from pipeline.engine.pressure import Load, Pressure
from pipeline.engine.sampling import OnTokens, Sampling, unheard
from pipeline.engine.server import ServerError
from pipeline.stored import Routes
from pipeline.types import Sampled

__all__ = ["Fleet", "FleetServer", "ServerProcess", "ServerState", "Transfer"]

_WATCH_S = 0.1
_PROBE_S = 5.0
_LISTEN_S = 1.0
_TRIES = 3  # of a request whose connection broke while its server lives


class Fleet:
    """Servers that hold the same weights, used as one client is. Without servers it only counts versions."""

    def __init__(self, servers: Sequence[FleetServer] = (), config: ServerConfig | None = None):
        """servers: started; `wait_ready` before the first request. config: how long a server may be silent, and how
        often one is started again."""
        self.config = config or ServerConfig()  # pyright: ignore[reportCallIssue]
        self.members = Membership(servers, self.config)
        self.sent_again = self.interrupted_requests = 0
        self._version = self._begun = 0
        self._updates, self._pressure = Updates(), Pressure()
        self.turns: Turns = Apart()
        self._source: Transfer | None = None
        self._sending = threading.Lock()
        self._interrupt: InterruptMode | None = None
        self._open: asyncio.Event | None = None
        self.entered: list[AsyncExitStack] = []  # each with the clients of all servers

    @property
    def servers(self) -> list[FleetServer]:
        return self.members.servers

    @property
    def serves(self) -> bool:
        """Whether there are servers."""
        return bool(self.servers)

    @property
    def version(self) -> int:
        """Of the weights that the servers hold."""
        return self._version

    @property
    def addresses(self) -> list[ServerAddress]:
        """Of every server."""
        return [server.address for server in self.servers]

    def begin_at(self, version: int) -> None:
        """A resumed run: its servers start with other weights, and the next transfer brings back this version."""
        self._version = version - 1
        self._begun = -1  # no server is started with the weights of a version

    def adopt(self, version: int) -> None:
        """A dumped step is replayed: it was sampled under this version. There are no servers that could differ."""
        assert not self.serves, "servers hold what was sent to them"
        self._version = version

    def wait_ready(self) -> None:
        """Block until every server answers. Raises ServerError with the end of the log of one that does not."""
        self.members.wait_ready()

    def check_alive(self) -> None:
        """Start again what has ended. Raises ServerError, with the end of a log, where that happened too often."""
        self.members.check()

    def close(self) -> None:
        """Start no server again."""
        self.members.close()

    def metrics(self) -> dict[str, float]:
        """Counts since the run began, and how many servers take requests; nothing where there are none."""
        if not self.serves:
            return {}
        counts = {
            "servers/requests_sent_again": float(self.sent_again),
            "servers/requests_interrupted": float(self.interrupted_requests),
            "servers/wide_routes": float(sum(s.client.decoder.wide_routes for s in self.servers)),
        }
        return self.members.metrics() | counts | self._pressure.metrics() | self.turns.metrics()

    # The weights

    def transfer(self, trainers: Transfer) -> None:
        """The trainer's weights to every server that is up, under the next version; without servers only the version
        moves. Requests must not be running, or stand still inside `interrupted`.

        A server that does not take part is lost, and so are those that were in the same transfer, for they may hold
        anything; it is made again with the next that are up. Raises ServerError where servers are given up, and what
        the trainer raises.
        """
        with self._sending:
            self._source = trainers
            self._version += 1  # before: servers that fail half-way hold neither the old weights nor the new
            self._updates.modes[self._version] = self._interrupt or "abort"
        flush = self._interrupt != "in_place"
        self._send(lambda addresses: trainers.send_weights(self._version, addresses, flush=flush))

    def send_again(self) -> None:
        """The weights that the servers held, to all of them, which lost them with their memory."""
        source, version = self._source, self._version
        if source is None or not self._send(lambda addresses: source.send_again(version, addresses)):
            raise RuntimeError(f"the trainer no longer holds the weights of version {version}: a transfer was left out")

    def _send[T](self, send: Callable[[Sequence[ServerAddress]], T]) -> T | None:
        """To every server that is up; again where one fails. Returns what `send` says; None: there are no servers."""
        if not self.serves:
            return None
        with self.turns.sending():
            while True:
                with self._sending:
                    members = self.members.reconcile()
                    losses = [server.losses for server in members]
                    try:
                        said = send([server.address for server in members])
                    except ServerError as error:
                        for server, known in zip(members, losses, strict=True):
                            self.members.lose(server, f"was in a transfer of weights that failed ({error})", known)
                        continue
                    self._hold(members)
                    return said

    def _hold(self, servers: Sequence[FleetServer]) -> None:
        """They hold the current weights."""
        for server in servers:
            server.client.version = self._version
            if server.state is ServerState.PENDING_WEIGHTS:
                server.state = ServerState.SERVING if self._interrupt is None else ServerState.PAUSED

    # Their memory, where the trainer has it by turns; see `colocation`

    def release_memory(self) -> None:
        """Every server gives its memory back, see Membership.release_memory."""
        self.members.release_memory()

    def resume_memory(self, part: ServerPart) -> None:
        """Every server takes this part back."""
        self.members.resume_memory(part)

    def catch_up(self) -> None:
        """The current weights to servers that came back, to them alone; where the trainer holds others by now, they
        wait for the next transfer."""
        if not any(s.state is ServerState.PENDING_WEIGHTS for s in self.servers):
            return
        with self.turns.sending(), self._sending:
            late = [s for s in self.servers if s.state is ServerState.PENDING_WEIGHTS]
            if not late:
                return
            losses = [server.losses for server in late]
            if self._version == self._begun:  # every server starts with these
                self._hold(late)
                return
            try:
                addresses = [server.address for server in late]
                if self._source is not None and self._source.send_again(self._version, addresses):
                    self._hold(late)
            except ServerError as error:
                for server, known in zip(late, losses, strict=True):
                    self.members.lose(server, f"did not take weights ({error})", known)

    @asynccontextmanager
    async def interrupted(self, mode: InterruptMode) -> AsyncIterator[None]:
        """Inside, nothing is sampled: a `transfer` belongs here. New requests wait outside, running ones meet with what
        `mode` says. Afterwards all go on. Inside `async with fleet` only, one at a time."""
        assert self._interrupt is None, "an interruption is no place for another"
        self._interrupt = mode
        self._refresh()
        stopped = [s for s in self.servers if s.state is ServerState.SERVING]
        try:
            self.interrupted_requests += sum(server.in_flight for server in stopped)
            for server in stopped:
                server.state = ServerState.PAUSED
            await asyncio.gather(*(self._or_lose(s, stop_requests(s, mode)) for s in stopped))
            yield
        finally:
            paused = [s for s in self.servers if s.state is ServerState.PAUSED]
            await asyncio.gather(*(self._or_lose(s, let_requests_go_on(s)) for s in paused))
            self._interrupt = None
            for server in paused:
                if server.state is ServerState.PAUSED:
                    held = server.client.version == self._version
                    server.state = ServerState.SERVING if held else ServerState.PENDING_WEIGHTS
            self._refresh()

    async def _or_lose(self, server: FleetServer, what: Awaitable[None]) -> None:
        """A server that fails, or hangs, meanwhile is lost."""
        losses = server.losses
        task = asyncio.ensure_future(what)
        while not task.done():
            await asyncio.wait({task}, timeout=_PROBE_S)
            if not task.done() and not await asyncio.to_thread(server.answers, self.config.probe_timeout_s):
                task.cancel()
                self.members.lose(server, "does not answer", losses)
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await task
            except ServerError as error:
                self.members.lose(server, f"failed ({error})", losses)

    # Requests

    async def __aenter__(self) -> Self:
        """Sampling calls belong inside; may be nested."""
        if not self.entered:
            await asyncio.to_thread(self.turns.sampling)
        stack = AsyncExitStack()
        for server in self.servers:
            await stack.enter_async_context(server.client)
        if not self.entered:
            self._open = asyncio.Event()
            self._refresh()
            for work in (self._watch, self._probe, self._listen):
                stack.push_async_callback(_end, asyncio.create_task(self._lasting(work)))
        self.entered.append(stack)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.entered.pop().aclose()
        if not self.entered:
            self._open = None

    async def sample(
        self,
        token_ids: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        routes_from: int = 0,
        group: object = None,
        on_tokens: OnTokens = unheard,
    ) -> Sampled:
        """SGLangClient.sample of one of the servers, see `pressure`. group: None belongs to none.

        Waits while no server takes requests. A request whose server is lost is sampled again, by another; see Told.
        """
        sent_under, began, sampler = self._version, time.monotonic(), None
        told = Told(token_ids, sampling)

        def ask(client: SGLangClient) -> Awaitable[Sampled]:
            nonlocal sent_under, sampler
            sent_under, sampler = self._version, client
            ids, left = told.left(self._version)
            return client.sample(ids, left, routes_from=routes_from, on_tokens=told.hear(on_tokens))

        part = told.whole(await self._ask(group, ask))
        try:
            must_be_current(part.weight_versions, sent_under, self._version)
        except ValueError as error:
            raise AnswerError(str(error)) from error
        return replace(
            part,
            mixed_kv=self._updates.mixed_kv(part.weight_versions),
            server=next((i for i, server in enumerate(self.servers) if server.client is sampler), None),
            seconds=time.monotonic() - began,
        )

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Routes | None]:
        """SGLangClient.score of one of the servers; asked again where an interruption aborts it."""
        while True:
            with contextlib.suppress(AbortedError):
                return await self._ask(None, lambda client: client.score(token_ids))

    async def _ask[T](self, group: object, ask: Callable[[SGLangClient], Awaitable[T]]) -> T:
        tries = 0
        while True:
            if self._open is not None:
                await self._open.wait()
            server = self._choose(group)
            if server is None:  # it was taken meanwhile
                continue
            with server.working(group):
                call: asyncio.Task[T] = asyncio.ensure_future(ask(server.client))  # pyright: ignore[reportAssignmentType]
                server.calls[call] = losses = server.losses
                try:
                    await asyncio.wait({call})
                    return call.result()
                except asyncio.CancelledError:
                    call.cancel()
                    if server.losses == losses or not call.cancelled() or given_up():
                        raise
                except UnreachableError:
                    tries += 1
                    if server.losses != losses:
                        pass  # another request has found out
                    elif await asyncio.to_thread(server.answers, self.config.probe_timeout_s):
                        if tries >= _TRIES:
                            raise
                    else:
                        why = "does not answer" if server.process.alive() else "died"
                        self.members.lose(server, why, losses)
                finally:
                    del server.calls[call]
            self.sent_again += 1

    def _choose(self, group: object) -> FleetServer | None:
        """Who gets the next request; None: nobody now. Raises ServerError where nobody ever will."""
        if self.members.failure is not None:
            raise self.members.failure
        serving = [server for server in self.servers if server.state is ServerState.SERVING]
        if serving and self._interrupt is None:
            return self._pressure.choose(serving, group)
        if self._open is None or not self.members.hopeful:
            raise ServerError(self.members.none_serves())
        self._refresh()
        return None

    def _refresh(self) -> None:
        """Let requests through where some server takes them, or none ever will."""
        if self._open is None:
            return
        serving = self._interrupt is None and any(s.state is ServerState.SERVING for s in self.servers)
        if serving or self.members.failure is not None or not self.members.hopeful:
            self._open.set()
        else:
            self._open.clear()

    async def _lasting(self, work: Callable[[], Awaitable[None]]) -> None:
        """What goes wrong beside the requests, a trainer that dies while it sends weights to a server that came back,
        ends the run: nothing else may ever ask the trainer, if no server gets weights."""
        try:
            await work()
        except Exception as error:
            self.members.failure = self.members.failure or error
            self._refresh()

    async def _watch(self) -> None:
        """Give up the requests of lost servers, and bring those that came back up to date."""
        while True:
            for server in self.servers:
                for call, losses in server.calls.items():
                    if losses != server.losses:
                        call.cancel()
                if server.state is ServerState.PENDING_WEIGHTS and self._interrupt is None:
                    await asyncio.to_thread(self.catch_up)
            self._refresh()
            await asyncio.sleep(_WATCH_S)

    async def _probe(self) -> None:
        """Lose servers that have ended or hang."""
        while True:
            await asyncio.sleep(min(_PROBE_S, self.config.probe_timeout_s))
            asked = [s for s in self.servers if s.state is ServerState.SERVING]
            limit, seen = self.config.probe_timeout_s, [s.losses for s in asked]
            found = await asyncio.gather(*(asyncio.to_thread(s.answers, limit) for s in asked))
            for server, losses, answers in zip(asked, seen, found, strict=True):
                if not answers and server.state is ServerState.SERVING:
                    why = "does not answer" if server.process.alive() else "died"
                    self.members.lose(server, why, losses)

    async def _listen(self) -> None:
        """Ask the servers how full they are."""
        while True:
            await asyncio.sleep(_LISTEN_S)
            asked = [(s, s.in_flight) for s in self.servers if s.state is ServerState.SERVING]
            found = await asyncio.gather(*(s.client.current_loads(_LISTEN_S) for s, _ in asked), return_exceptions=True)
            pairs = zip(asked, found, strict=True)
            said = {s: Load.of(f, n) for (s, n), f in pairs if not isinstance(f, BaseException)}
            for error in found:
                if isinstance(error, BaseException) and not isinstance(error, ServerError):
                    raise error  # those of a server that is silent are the probe's
            self._pressure.hear(said)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
