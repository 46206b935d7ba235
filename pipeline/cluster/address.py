"""Whether a Ray cluster answers where `cluster.address` says, before anything is started.

Ray (2.60) itself tries for a minute and a half, in words of its own, and then ends the process.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pipeline.cluster.placement import PlacementError
from pipeline.errors import NOT_STARTED

_LAST_STARTED = Path("/tmp/ray/ray_current_cluster")
CONNECT_S = 5.0


class NoClusterError(PlacementError):
    """There is no Ray cluster to join, found before anything was started."""

    exit_code = NOT_STARTED


def check_address(address: str | None) -> None:
    """Raise NoClusterError for what is no address, and where nothing listens there. None: no cluster is joined."""
    if address is None:
        return
    target = (os.environ.get("RAY_ADDRESS") or _last_started()) if address == "auto" else address
    host, _, port = target.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise NoClusterError(
            f"cluster.address reads HOST:PORT, as `ray start --head` says it, or auto, not {target!r}; leave it out "
            "and a Ray of the run's own is started on this machine"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise NoClusterError(
            f"no Ray cluster answers at cluster.address={target}: {error.strerror or error}; start one there with "
            "`ray start --head`, or leave cluster.address out"
        ) from error


def _last_started() -> str:
    """Where Ray looks for the cluster of this machine. Raises NoClusterError where there is none."""
    try:
        return _LAST_STARTED.read_text().strip()
    except OSError as error:
        raise NoClusterError(
            "cluster.address=auto finds no Ray cluster on this machine; start one with `ray start --head`, give "
            "HOST:PORT, or leave cluster.address out"
        ) from error
