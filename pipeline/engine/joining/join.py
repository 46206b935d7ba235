"""A server joins a fleet, or leaves it, between two steps: no transfer of weights is under way."""

from __future__ import annotations

import asyncio

from pipeline.engine.fleet import Fleet
from pipeline.engine.interruption import stop_requests
from pipeline.engine.membership import FleetServer, ServerState
from pipeline.engine.server import ServerError

LEAVE_S = 30.0
"""Seconds in which a server that leaves has to end its answers; then they are sampled again by the others."""


class MembershipError(ServerError):
    """A server cannot join, or leave; the run goes on as it was."""


async def join(fleet: Fleet, server: FleetServer) -> None:
    """A server that holds the current weights gets requests from now on. On the event loop that the fleet is entered
    on, where it is."""
    for stack in fleet.entered:
        await stack.enter_async_context(server.client)
    server.client.version, server.state = fleet.version, ServerState.SERVING
    fleet.members.add(server)


async def leave(fleet: Fleet, server: FleetServer) -> None:
    """It gets no more requests, and those that it has end with what they have: their sessions go on elsewhere. On the
    event loop that the fleet is entered on, where it is. Raises MembershipError where no other server takes requests.
    """
    if not any(s.state is ServerState.SERVING for s in fleet.servers if s is not server):
        raise MembershipError(
            f"{server.process.url} is the last server that takes requests, and cannot leave; add another first"
        )
    server.state = ServerState.PAUSED
    if fleet.entered:
        try:
            await asyncio.wait_for(stop_requests(server, "abort"), LEAVE_S)
        except (ServerError, TimeoutError):
            server.losses += 1  # the fleet gives its requests up, and asks others
    fleet.members.leave(server)
