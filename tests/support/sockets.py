"""Where processes listen."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil


class Listening(NamedTuple):
    """A TCP socket. process: its name and number."""

    process: str
    address: str
    port: int


def environment_has(text: bytes) -> list[psutil.Process]:
    """The processes whose environment holds the text."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and text in (folder / "environ").read_bytes():
                found.append(psutil.Process(int(folder.name)))
        except (OSError, psutil.NoSuchProcess):  # gone meanwhile, or another user's
            continue
    return found


def listening(processes: Iterable[psutil.Process]) -> list[Listening]:
    """What they listen at, TCP."""
    found = []
    for process in processes:
        try:
            name, connections = f"{process.name()} {process.pid}", process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:  # gone meanwhile
            continue
        found += [Listening(name, c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def reachable(sockets: Iterable[Listening]) -> list[Listening]:
    """Those of them that other machines reach."""
    return [s for s in sockets if not _is_loopback(s.address)]


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    # gRPC has IPv6 sockets for IPv4 addresses: ::ffff:127.0.0.1.
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
