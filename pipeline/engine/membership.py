"""Which servers of a run are up: who is lost, what brings it back, and when that is given up.

A server that ends, hangs or fails in a transfer is lost: all its processes are killed and it is started again, in the
background. It then holds the weights that the run began with, and gets no request before it holds the current ones.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from pipeline.cluster.colocation import ServerPart
from pipeline.cluster.stacks import ProcessStacks
from pipeline.config.server import ServerConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.control import ServerAddress, SGLangControl
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import NodeGoneError, ServerError
from pipeline.restart_budget import RestartBudget
from pipeline.say import to_stderr
from pipeline.waiting import Waiting


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
    def stacks(self) -> list[ProcessStacks]: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...


class ServerState(Enum):
    """starting: it loads. pending_weights: it is up, with weights that are not the current ones. serving: it gets
    requests. paused: it holds the current weights, or is about to, and gets no requests. lost: it ended, or hangs.
    left: it was taken out."""

    STARTING = "starting"
    PENDING_WEIGHTS = "pending_weights"
    SERVING = "serving"
    PAUSED = "paused"
    LOST = "lost"
    LEFT = "left"


OUT = (ServerState.LOST, ServerState.LEFT)
_LOOK_S = 5.0  # between two looks for a node that has room for a server
UP = (ServerState.PENDING_WEIGHTS, ServerState.SERVING, ServerState.PAUSED)


@dataclass(eq=False)
class FleetServer:
    """One server.

    client: its HTTP interface, for sampling and for control. in_flight: requests that it works on, and groups: how many
    of each group. losses: how often it was lost. calls: tasks of its requests, and `losses` when they began: those of
    before are given up. halted: its schedulers stand still. released: what of its memory it has given back. added:
    somebody else started it; once it is lost, it has left.
    """

    process: ServerProcess
    client: SGLangClient
    added: bool = False
    state: ServerState = field(default=ServerState.STARTING, init=False)
    in_flight: int = field(default=0, init=False)
    groups: Counter[object] = field(default_factory=Counter, init=False)
    losses: int = field(default=0, init=False)
    calls: dict[asyncio.Task[Any], int] = field(default_factory=dict, init=False)
    halted: bool = field(default=False, init=False)
    released: tuple[ServerPart, ...] = field(default=(), init=False)

    @property
    def address(self) -> ServerAddress:
        """What another process needs to reach it."""
        return ServerAddress(self.process.url, self.process.log_path, self.process.keys)

    @contextmanager
    def working(self, group: object) -> Iterator[None]:
        """Around a request of this group."""
        self.groups[group] += group is not None
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.groups[group] -= group is not None
            if not self.groups[group]:
                del self.groups[group]

    def control(self, timeout_s: float) -> SGLangControl:
        """For calls that steer it and take no longer."""
        process = self.process
        return SGLangControl(process.url, keys=process.keys, timeout_s=timeout_s, log_path=process.log_path)

    def release_memory(self, timeout_s: float) -> None:
        """All of it; see SGLangControl."""
        self.control(timeout_s).release_memory()

    def resume_memory(self, part: ServerPart, timeout_s: float) -> None:
        """One that was started since has it."""
        if part in self.released:
            self.control(timeout_s).resume_memory(part)
            self.released = tuple(other for other in self.released if other != part)

    def answers(self, timeout_s: float) -> bool:
        """Whether its process runs and its schedulers answer."""
        control = self.control(timeout_s)
        for _ in range(2):  # a machine that stood still for the first is no fault of the server
            try:
                if self.process.alive():
                    control.ask_schedulers()
                    return True
            except ServerError:
                continue
        return False


class Membership:
    """All servers of a run. May be called from any thread.

    lost, restarted, joined, left: how often. failure: why the run is to end, once it is. say: hears of what is lost.
    """

    def __init__(self, servers: Sequence[FleetServer], config: ServerConfig, say: Callable[[str], None] = to_stderr):
        self.servers, self.say = list(servers), say
        self.lost = self.restarted = self.joined = self.left = 0
        self._config, self.waits = config, Waiting(say)
        self._lock, self._starting = threading.RLock(), threading.Lock()
        self._budget = RestartBudget(config.max_restarts, config.restart_window_s)
        self.failure: Exception | None = None
        self._closing = threading.Event()
        self._coming: set[FleetServer] = set()
        self._held_back = False

    def wait_ready(self) -> None:
        """Block until every server answers. Raises ServerError with the end of the log of one that does not."""
        for server in self.servers:
            if server.state is ServerState.STARTING:
                server.process.wait_ready()
                server.state = ServerState.SERVING

    def check(self) -> None:
        """Look for processes that have ended; raise ServerError where servers are given up."""
        for server in self.servers:
            if server.state in UP and not server.process.alive():
                self.lose(server, "died")
        if self.failure is not None:
            raise self.failure

    def reconcile(self) -> list[FleetServer]:
        """Those that answer now, to take part in a transfer; one that does not is lost. Waits while there is none.

        Raises ServerError where servers are given up, or none will come.
        """
        while True:
            self.check()
            members = [s for s in self.servers if s.state in UP]
            with ThreadPoolExecutor(max(1, len(members))) as threads:
                list(threads.map(self._probe, members))
            members = [s for s in members if s.state in UP]
            if members:
                return members
            self.check()
            if not self._coming:
                raise ServerError(self.none_serves())
            time.sleep(0.1)

    def _probe(self, server: FleetServer) -> None:
        """Lose it where it does not answer now."""
        losses = server.losses
        named = f"the server {server.process.url} (log: {server.process.log_path})"
        with self.waits.during("the probe before a transfer", lambda: named):
            answers = server.answers(self._config.probe_timeout_s)
        if not answers:
            self.lose(server, "does not answer", losses)

    def none_serves(self) -> str:
        """Why no request can be made."""
        states = ", ".join(server.state.value for server in self.servers) or "there are none"
        return f"no server takes requests: {states}"

    @property
    def hopeful(self) -> bool:
        """Whether a server will come, or wait for weights."""
        return bool(self._coming) or any(s.state not in OUT for s in self.servers)

    def lose(self, server: FleetServer, why: str, losses: int | None = None) -> None:
        """Kill what is left of a server and start it again, in the background; after `max_restarts` of all servers in
        `restart_window_s`, give the run up. losses: its own when the fault began; one of before is known already."""
        with self._lock:
            known = server.state in OUT or (losses is not None and losses != server.losses)
            if known or self._closing.is_set():
                return
            server.state, server.halted, server.released = ServerState.LOST, False, ()
            server.losses += 1
            self.lost += 1
            if server.added:
                server.state = ServerState.LEFT
                url = server.process.url
                self.say(
                    f"the run goes on without the added server {url}, which {why}"
                    if self.hopeful
                    else f"the added server {url} {why}, and there is no other"
                )
                return
            if not self._budget.take():
                most, within_s = self._budget.most, self._budget.within_s
                limit = f"server.max_restarts={most} in {within_s:g} s are used up"
                self.failure = ServerError(f"the SGLang server {why}; {limit}\n{server.process.log_tail()}")
                return
            self.say(f"the SGLang server {why} and is started again (log: {server.process.log_path})")
            self._coming.add(server)
        threading.Thread(target=self._restart, args=(server,), name="sameroute restart", daemon=True).start()

    def add(self, server: FleetServer) -> None:
        """A server more. Numbers of servers stay: one that has left keeps its own."""
        with self._lock:
            self.servers.append(server)
            self.joined += 1

    def leave(self, server: FleetServer) -> None:
        """It is taken out, and what is left of its requests given up."""
        with self._lock:
            server.state, server.halted = ServerState.LEFT, False
            self.left += 1

    def release_memory(self) -> None:
        """Every server ends what it has in hand and gives its memory back. One that does not is lost, and its processes
        are ended; none is started before `resume_memory`. Raises ServerError where servers are given up."""
        with self._starting:
            self._held_back = True
        while any(server.state is ServerState.STARTING for server in self.servers):
            self.check()
            time.sleep(0.1)
        for server in self._each("give its memory back", lambda s: s.release_memory(self._config.memory_timeout_s)):
            server.released = ("weights", "cache")
        for server in self.servers:
            if server.state is ServerState.LOST:
                server.process.stop()
        self.check()

    def resume_memory(self, part: ServerPart) -> None:
        """Every server takes this part back; one that cannot is lost. What was lost before is started again now. Raises
        ServerError where servers are given up."""
        self._held_back = False
        self._each("take its memory back", lambda s: s.resume_memory(part, self._config.memory_timeout_s))
        self.check()

    def _each(self, what: str, call: Callable[[FleetServer], None]) -> list[FleetServer]:
        """Ask all that are up, at once; those that did it. The others are lost."""
        servers, done = [server for server in self.servers if server.state in UP], []
        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            calls = [(server, server.losses, threads.submit(call, server)) for server in servers]
        for server, losses, made in calls:
            try:
                made.result()
                done.append(server)
            except ServerError as error:
                self.lose(server, f"did not {what} ({error})", losses)
        return done

    def bring_back(self, server: FleetServer) -> None:
        """Start one that has left again, in the background; it gets requests once it holds the current weights."""
        with self._lock:
            server.state = ServerState.LOST
            self.joined += 1
            self._coming.add(server)
        threading.Thread(target=self._restart, args=(server,), name="sameroute restart", daemon=True).start()

    def metrics(self) -> dict[str, float]:
        """Counts since the run began, and how many servers take requests."""
        counts = {"lost": self.lost, "restarted": self.restarted, "joined": self.joined, "left": self.left}
        serving = sum(server.state is ServerState.SERVING for server in self.servers)
        return {f"servers/{name}": float(count) for name, count in ({"serving": serving} | counts).items()}

    def _restart(self, server: FleetServer) -> None:
        losses = server.losses
        try:
            while not self._closing.is_set() and not self._started(server):
                self._closing.wait(_LOOK_S)
        except (ServerError, OSError) as error:
            if not self._closing.is_set():
                # its log follows where this was the last time
                self.lose(server, f"did not start again: {str(error).partition('\n')[0]}", losses)
        except Exception as error:  # a mistake of ours: else all would wait for this server for ever
            if not self._closing.is_set():
                self.failure = self.failure or error
        finally:
            with self._lock:
                if server.losses == losses and server.state is not ServerState.LOST:  # else another thread starts it
                    self._coming.discard(server)

    def _started(self, server: FleetServer) -> bool:
        """Whether it has, or was taken out: False where its node is gone and no other has room, and where none may
        start now. Raises ServerError where it does not start."""
        try:
            with self._starting:
                if self._closing.is_set() or self._held_back:
                    return False
                if server.state is ServerState.LEFT:
                    return True
                server.state = ServerState.STARTING  # before: what fails from here on is another loss
                server.process.restart()
            server.process.wait_ready()
        except NodeGoneError as error:
            self._leave(server, error)
            return False
        with self._lock:
            if server.state is ServerState.LEFT:
                return True
            server.client.url = server.process.url
            server.state = ServerState.PENDING_WEIGHTS
            self.restarted += 1
        return True

    def _leave(self, server: FleetServer, error: ServerError) -> None:
        """Its node is gone: the others go on without it, until another node has room for it."""
        with self._lock:
            if server.state is not ServerState.LEFT:
                server.state = ServerState.LOST
            if server not in self._coming:
                return
            self._coming.discard(server)
            self.say(f"the run goes on without a server: {error}")
            if all(s.state in OUT for s in self.servers) and not self._coming:
                self.failure = error

    def close(self) -> None:
        """No server is started any more; whoever started the servers stops them."""
        with self._starting:  # one that is being started is stopped like the others
            self._closing.set()
