"""What a run does, after a step, about servers that are to join or leave.

A server that joins is checked as the run's own are: it runs as they do, serves a model of the same parameters, takes
the current weights (sent to it alone), holds them bit for bit, and scores sequences of the last step as the trainer
does. Only then it gets requests. What is refused is said, and the run goes on as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.engine.client import SGLangClient
from pipeline.engine.control import ServerAddress, SGLangControl
from pipeline.engine.fleet import FleetServer, ServerState
from pipeline.engine.joining import server_requests
from pipeline.engine.joining.added_server import AddedServer
from pipeline.engine.joining.join import MembershipError, join, leave
from pipeline.engine.joining.server_requests import ServerRequest
from pipeline.engine.samplers.stored_client import through_samplers
from pipeline.engine.server import ServerError
from pipeline.loop.compare import DisagreementError
from pipeline.loop.engines import client_of, sampler_count
from pipeline.loop.evaluations import on_own_loop
from pipeline.loop.loop import Loop
from pipeline.rollout.answers import Scored
from pipeline.types import Rollout

_SAME = (
    "enable_return_routed_experts",
    "enable_deterministic_inference",
    "context_length",
    "dtype",
    "quantization",
    "kv_cache_dtype",
)
"""Settings of SGLang's in which all servers of a run are alike."""


class ServerChanges:
    """A context: what was made for added servers ends with it. run: its directory. say: hears of each change."""

    def __init__(self, loop: Loop, run: Path, say: Callable[[str], None]):
        self._loop, self._run, self._say = loop, run, say
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> ServerChanges:
        return self

    def __exit__(self, *details: object) -> None:
        self._inside.__exit__(None, None, None)

    def after(self, rollouts: Sequence[Rollout]) -> None:
        """Do what was asked for since the last step. rollouts: of that step, whose weights are transferred."""
        if not self._loop.fleet.serves:
            return
        for request in server_requests.waiting(self._run):
            try:
                words = self._add(request, rollouts) if request.action == "add" else self._remove(request)
                server_requests.answer(self._run, request, words, refused=False)
            except (ServerError, DisagreementError) as error:
                words = f"{request.url} is not {'added' if request.action == 'add' else 'removed'}: {error}"
                server_requests.answer(self._run, request, words, refused=True)
            self._say(words)
        server_requests.write_now(self._run, [_row(server) for server in self._loop.fleet.servers])

    def _known(self, url: str) -> FleetServer | None:
        """The newest server at this address."""
        return next((s for s in reversed(self._loop.fleet.servers) if s.process.url == url), None)

    def _remove(self, request: ServerRequest) -> str:
        fleet, server = self._loop.fleet, self._known(request.url)
        if server is None or server.state is ServerState.LEFT:
            known = ", ".join(s.process.url for s in fleet.servers if s.state is not ServerState.LEFT)
            raise MembershipError(f"the run has no server at {request.url}; it has {known}")
        self._loop.on_servers(lambda: leave(fleet, server))
        server.process.stop()
        return f"{request.url} has left; its open answers go on elsewhere"

    def _add(self, request: ServerRequest, rollouts: Sequence[Rollout]) -> str:
        fleet, known = self._loop.fleet, self._known(request.url)
        if known is not None and known.state is not ServerState.LEFT:
            raise MembershipError(f"it is a server of the run already, and {known.state.value}")
        if self._loop.config.cluster.colocated:
            raise MembershipError("the run's trainer and servers take turns on their GPUs (cluster.colocated)")
        if known is not None and not known.added:
            fleet.members.bring_back(known)
            return f"{request.url} is started again, at an address that may be another"
        if request.keys is None:
            raise MembershipError("its keys are missing; give --keys FILE")
        keys = server_requests.read_keys(Path(request.keys))
        process = AddedServer(request.url, keys, None if request.log is None else Path(request.log))
        self._check_alike(process)
        self._send_weights(process)
        client = client_of(self._loop.config, self._loop.shape, process, routes=self._loop.replay.from_server)
        client.version = fleet.version
        found = self._loop.compare_scored(on_own_loop(lambda: _scored(client, self._some(rollouts))))
        if sampler_count(self._loop.config, len(fleet.servers)):
            (client,) = self._inside.enter_context(through_samplers([client], 1, [None]))
        server = FleetServer(process, client, added=True)
        self._loop.on_servers(lambda: join(fleet, server))
        gap = found["mismatch/abs_logprob"]
        return (
            f"{request.url} has joined as server {len(fleet.servers) - 1}, with weights {fleet.version}; on "
            f"{found['staleness/scored_tokens']:.0f} tokens its log-probs are {gap:.1e} nats from the trainer's"
        )

    def _some(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Sequences to be scored."""
        return [rollout for rollout in rollouts if len(rollout)][: max(1, self._loop.config.checks.scored_rollouts)]

    def _check_alike(self, process: AddedServer) -> None:
        """Raise MembershipError for a server that is not reached, not opened by its keys, or not like the others."""
        config = self._loop.config.server
        new = SGLangControl(process.url, keys=process.keys, timeout_s=config.probe_timeout_s)
        try:
            told = new.server_info()
        except ServerError as error:
            if " answered 401" in str(error):
                raise MembershipError("these keys do not open it; give the file that its --start wrote") from error
            raise
        own = next((s for s in self._loop.fleet.servers if s.state is ServerState.SERVING), None)
        if own is None:
            raise MembershipError("no server of the run takes requests now, to which it could be compared; ask again")
        reference = SGLangControl(own.process.url, keys=own.process.keys, timeout_s=config.probe_timeout_s)
        expected = reference.server_info()
        for name in _SAME:
            if told.get(name) != expected.get(name):
                raise MembershipError(f"it runs with {name}={told.get(name)}, the others with {expected.get(name)}")
        held, wanted = ({p for rank in c.held_weights([]) for p in rank.parameters} for c in (new, reference))
        if held != wanted:
            odd = min(held ^ wanted)
            raise MembershipError(f"it serves another model: {odd} is only {'there' if odd in held else 'here'}")

    def _send_weights(self, process: AddedServer) -> None:
        """The current weights to it alone; afterwards it holds them bit for bit. Raises ServerError."""
        fleet, trainers = self._loop.fleet, self._loop.trainers
        address = ServerAddress(process.url, process.log_path, process.keys)
        if not trainers.send_again(fleet.version, [address]):
            raise MembershipError("the trainer's weights are not those of a transfer now; ask again after a step")
        if wrong := trainers.weight_differences():
            raise MembershipError(f"it does not hold the weights that were sent: {wrong[0]} and {len(wrong) - 1} more")


async def _scored(client: SGLangClient, rollouts: Sequence[Rollout]) -> list[Scored]:
    async with client:
        found = await asyncio.gather(*(client.score(rollout.token_ids) for rollout in rollouts))
    return [(rollout, *score) for rollout, score in zip(rollouts, found, strict=True)]


def _row(server: FleetServer) -> dict[str, object]:
    process, version = server.process, server.client.version
    return {"url": process.url, "state": server.state.value, "weights": version, "added": server.added}
