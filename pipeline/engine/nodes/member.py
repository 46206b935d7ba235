"""One node's part of an SGLang server (0.5.23) that spans several: SGLang's `--nnodes`, `--node-rank` and
`--dist-init-addr`.

Each part is a process tree of its own with the schedulers of that node's GPUs. The first one's answers HTTP, for all of
them. On the others SGLang's first process answers `/health` and nothing else, once its schedulers have loaded.
"""

from __future__ import annotations

import random
import socket

from pipeline import http
from pipeline.engine.server import FREE_PORTS, ServerError, SGLangServer

_MEETING_PORTS = 7
"""From the one where ranks meet on: with DP attention SGLang puts its own sockets on those behind it (`PortArgs`)."""
_TRIES = 50


class Member(SGLangServer):
    """The part of node `rank`, of `nodes`; `meeting` is to be set before each start: HOST:PORT of the first node.

    whole: the server, not started. Its log is that of the first part; another's stands beside it.
    """

    def __init__(self, whole: SGLangServer, rank: int, nodes: int):
        log = whole.log_path
        super().__init__(
            whole.config,
            whole.model_path,
            log if rank == 0 else log.with_stem(f"{log.stem}_node_{rank}"),
            device=whole.device,
            seed=whole.seed,
            return_routed_experts=whole.return_routed_experts,
            precision=whole.precision,
            trust_remote_code=whole.trust_remote_code,
            keys=whole.keys,
            base_gpu=whole.base_gpu,
            environment=whole.environment,
            memory_saver=whole.memory_saver,
        )
        self.rank, self.nodes, self.meeting = rank, nodes, ""

    def arguments(self) -> list[str]:
        """SGLang's command line; see SGLangServer."""
        if self.nodes == 1:
            return super().arguments()
        where = {"--nnodes": self.nodes, "--node-rank": self.rank, "--dist-init-addr": self.meeting}
        return super().arguments() + [text for name, value in where.items() for text in (name, str(value))]

    def _environment(self) -> dict[str, str]:
        # Else it asks the machine's routes which address is its own, and fails without one to the Internet.
        own = {"SGLANG_HOST_IP": self.config.host} if self.nodes > 1 else {}
        return super()._environment() | own

    def _answers(self) -> bool:
        if self.rank == 0:
            return super()._answers()
        try:
            return http.request("GET", f"{self.url}/health", timeout_s=5).status == 200
        except (http.HttpError, TimeoutError):  # not listening yet
            return False

    def _freeze_garbage_collection(self) -> None:
        if self.rank == 0:  # which tells all schedulers
            super()._freeze_garbage_collection()


def meeting_at(host: str) -> str:
    """HOST:PORT where the ranks of a server may meet on this machine, with free ports behind it. Raises ServerError
    where there are none."""
    reason = ""
    for first in random.sample(FREE_PORTS[:-_MEETING_PORTS], _TRIES):
        try:
            for port in range(first, first + _MEETING_PORTS):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host, port))
        except OSError as error:
            reason = error.strerror
            continue
        return f"{host}:{first}"
    raise ServerError(f"cannot listen on {_MEETING_PORTS} ports of {host} in a row: {reason}")
