"""An SGLang server on another node of the Ray cluster: an actor there starts, watches and stops it as a child."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.cluster.placement import on_node
from pipeline.cluster.stacks import ProcessStacks
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import NodeGoneError, ServerError, SGLangServer

_ANSWER_S = 60.0  # of a call that only looks; a node that needs longer is gone


class _Host:
    """Runs in the actor. Calls come from several threads, so that one can look while another waits."""

    def __init__(self, server: SGLangServer, reachable: bool):
        if reachable:  # what listens on a loopback address cannot be reached from the other nodes
            server.config = server.config.model_copy(update={"host": ray.util.get_node_ip_address()})
        self.server = server

    def start(self) -> str:
        self.server.start()
        return self.server.url

    def restart(self) -> str:
        self.server.restart()
        return self.server.url

    def wait_ready(self, timeout_s: float | None) -> None:
        self.server.wait_ready(timeout_s)

    def alive(self) -> bool:
        return self.server.alive()

    def stacks(self) -> list[ProcessStacks]:
        return self.server.stacks()

    def stop(self) -> None:
        self.server.stop()


class RemoteServer:
    """A server that has not been started, placed on a node; used as an SGLangServer is.

    Its log is written to the same path on that node: the run directory is one that every node sees.
    """

    def __init__(
        self,
        server: SGLangServer,
        node: str,
        *,
        gpus: bool,
        reachable: bool,
        another: Callable[[], str | None] = lambda: None,
    ):
        """node: of Ray. reachable: from other nodes, at an address of it whatever `server.host` says. another: a node
        that has room for it now, where its own is gone."""
        server.log_path = server.log_path.resolve()
        server.model_path = server.model_path.resolve()
        self._server, self._url, self._another = server, "", another
        self._gpus, self._reachable = server.config.tensor_parallel if gpus else 0, reachable
        self._node_gone = False
        self.node = node
        self._actor = self._host_on(node)

    def _host_on(self, node: str) -> Any:
        actor: Any = ray.remote(_Host)
        return actor.options(
            num_cpus=0, num_gpus=self._gpus, max_restarts=0, max_concurrency=4, **on_node(node)
        ).remote(self._server, self._reachable)

    @property
    def log_path(self) -> Path:
        return self._server.log_path

    @property
    def keys(self) -> ServerKeys:
        """That open it."""
        return self._server.keys

    @property
    def url(self) -> str:
        """http://host:port, the host an address of the node. Raises ServerError before start()."""
        return self._url or self._server.url

    def start(self) -> None:
        """Start the server's processes; raises ServerError when they could never work."""
        self._url = self._ask(lambda: self._actor.start.remote(), None)

    def restart(self) -> None:
        """As SGLangServer.restart, on the same node; on another where that was found gone before. Raises NodeGoneError
        where it is gone, or no other has room."""
        if self._node_gone:
            node = self._another()
            if node is None:
                what = f"the server that was at {self._url}; its log: {self.log_path}"
                raise NodeGoneError(f"no node has room for {what}")
            self._actor, self._node_gone, self.node = self._host_on(node), False, node
        self._url = self._ask(lambda: self._actor.restart.remote(), None)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Block until the server answers; as SGLangServer.wait_ready."""
        self._ask(lambda: self._actor.wait_ready.remote(timeout_s), None)

    def alive(self) -> bool:
        """Whether its node, the actor and the server's first process run."""
        try:
            return ray.get(self._actor.alive.remote(), timeout=_ANSWER_S)
        except (RayActorError, TimeoutError):
            return False

    def stacks(self) -> list[ProcessStacks]:
        """Of all its processes, now. Raises NodeGoneError."""
        try:
            return self._ask(lambda: self._actor.stacks.remote(), _ANSWER_S)
        except TimeoutError as error:
            raise NodeGoneError(f"the node of the server {self._url} does not answer") from error

    def log_tail(self) -> str:
        """The last lines of the log, under its path."""
        return self._server.log_tail()

    def stop(self) -> None:
        """End the server and the actor; one that is gone already is no error."""
        try:
            ray.get(self._actor.stop.remote(), timeout=_ANSWER_S)
        except (RayActorError, TimeoutError):  # the node is gone, or will be with the job
            pass
        finally:
            ray.kill(self._actor)

    def _ask(self, call: Callable[[], Any], timeout_s: float | None) -> Any:
        try:
            return ray.get(call(), timeout=timeout_s)
        except RayTaskError as error:
            raise ServerError(str(error.cause)) from error
        except RayActorError as error:
            self._node_gone = True
            raise NodeGoneError(f"the node of the server {self._url} is gone; its log: {self.log_path}") from error
