"""An SGLang server on other nodes of the Ray cluster: on each an actor starts, watches and stops its part as a child.

Most servers stand on one node. One of more GPUs than a node has spans several (`member.py`), and is one server all the
same: where one part dies, all are ended, and started together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.cluster.placement import on_node
from pipeline.cluster.stacks import ProcessStacks
from pipeline.engine.keys import ServerKeys
from pipeline.engine.nodes.member import Member, meeting_at
from pipeline.engine.server import NodeGoneError, ServerError, SGLangServer

_ANSWER_S = 60.0  # of a call that only looks; a node that needs longer is gone


class _Host:
    """Runs in the actor. Calls come from several threads, so that one can look while another waits."""

    def __init__(self, server: Member, reachable: bool):
        if reachable:  # what listens on a loopback address cannot be reached from the other nodes
            server.config = server.config.model_copy(update={"host": ray.util.get_node_ip_address()})
        self.server = server

    def meeting(self) -> str:
        return meeting_at(self.server.config.host)

    def start(self, meeting: str) -> str:
        self.server.meeting = meeting
        self.server.start()
        return self.server.url

    def restart(self, meeting: str) -> str:
        self.server.meeting = meeting
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
    """A server that has not been started, placed on nodes; used as an SGLangServer is.

    Its logs are written to the same paths on those nodes: the run directory is one that every node sees.
    """

    def __init__(
        self,
        server: SGLangServer,
        nodes: Sequence[str],
        *,
        gpus: bool,
        reachable: bool,
        another: Callable[[], Sequence[str] | None] = lambda: None,
    ):
        """nodes: of Ray, the same number of its GPUs on each. reachable: from other nodes, at an address of them
        whatever `server.host` says. another: as many that have room for it now, where one of its own is gone."""
        server.log_path = server.log_path.resolve()
        server.model_path = server.model_path.resolve()
        self._server, self._url, self._another = server, "", another
        self._gpus = server.config.tensor_parallel // len(nodes) if gpus else 0
        self._reachable = reachable
        self._node_gone = False
        self._members = [Member(server, rank, len(nodes)) for rank in range(len(nodes))]
        self._place(nodes)

    def _place(self, nodes: Sequence[str]) -> None:
        self.node = nodes[0]  # where it answers HTTP
        self._actors = [self._host_on(node, member) for node, member in zip(nodes, self._members, strict=True)]

    def _host_on(self, node: str, member: Member) -> Any:
        actor: Any = ray.remote(_Host)
        options = {"num_cpus": 0, "num_gpus": self._gpus, "max_restarts": 0, "max_concurrency": 4}
        return actor.options(**options, **on_node(node)).remote(member, self._reachable)

    @property
    def log_path(self) -> Path:
        """Of the part that answers HTTP."""
        return self._server.log_path

    @property
    def keys(self) -> ServerKeys:
        """That open it."""
        return self._server.keys

    @property
    def url(self) -> str:
        """http://host:port, the host an address of the first node. Raises ServerError before start()."""
        return self._url or self._server.url

    def start(self) -> None:
        """Start the server's processes; raises ServerError when they could never work."""
        self._begin("start")

    def restart(self) -> None:
        """As SGLangServer.restart, on the same nodes; on others where one was found gone before. Raises NodeGoneError
        where one is gone, or no others have room."""
        if self._node_gone:
            nodes = self._another()
            if nodes is None:
                what = f"the server that was at {self._url}; its log: {self.log_path}"
                raise NodeGoneError(f"no node has room for {what}")
            self._place(nodes)
            self._node_gone = False
        self._begin("restart")

    def _begin(self, call: str) -> None:
        """Every part; those of several nodes meet at a place of the first."""
        if call == "restart" and len(self._actors) > 1:  # else a part would meet one that is still being ended
            self._ask("stop", None)
        meeting = self._ask("meeting", None, self._actors[:1])[0] if len(self._actors) > 1 else ""
        self._url = self._ask(call, None, self._actors, meeting)[0]

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Block until the server answers; as SGLangServer.wait_ready."""
        self._ask("wait_ready", None, self._actors, timeout_s)

    def alive(self) -> bool:
        """Whether on all its nodes the actor and the server's first process run."""
        try:
            return all(ray.get([actor.alive.remote() for actor in self._actors], timeout=_ANSWER_S))
        except (RayActorError, TimeoutError):
            return False

    def stacks(self) -> list[ProcessStacks]:
        """Of all its processes, now. Raises NodeGoneError."""
        try:
            return [stack for found in self._ask("stacks", _ANSWER_S) for stack in found]
        except TimeoutError as error:
            raise NodeGoneError(f"the node of the server {self._url} does not answer") from error

    def log_tail(self) -> str:
        """The last lines of every part's log, each under its path."""
        return "\n".join(member.log_tail() for member in self._members)

    def stop(self) -> None:
        """End the server and the actors; one that is gone already is no error. Raises ServerError when a process cannot
        be killed."""
        asked, failures = [actor.stop.remote() for actor in self._actors], list[str]()
        for actor, ended in zip(self._actors, asked, strict=True):
            try:
                ray.get(ended, timeout=_ANSWER_S)
            except (RayActorError, TimeoutError):  # the node is gone, or will be with the job
                pass
            except RayTaskError as error:
                failures.append(str(error.cause))
            finally:
                ray.kill(actor)
        if failures:
            raise ServerError("; ".join(failures))

    def _ask(self, call: str, timeout_s: float | None, actors: Sequence[Any] = (), *arguments: Any) -> list[Any]:
        """The answers of all actors, or of some, in their order. Raises ServerError as soon as one of them fails,
        TimeoutError."""
        asked = [getattr(actor, call).remote(*arguments) for actor in actors or self._actors]
        waiting = asked
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=timeout_s)
                if not done:
                    raise TimeoutError
                ray.get(done)
            return ray.get(asked)
        except RayTaskError as error:
            raise ServerError(str(error.cause)) from error
        except RayActorError as error:
            self._node_gone = True
            self.stop()  # what it has on other nodes
            raise NodeGoneError(f"the node of the server {self._url} is gone; its log: {self.log_path}") from error
