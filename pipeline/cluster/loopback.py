"""Where one machine runs all of a run, its processes talk to each other where no other machine can listen in or join.

gloo and NCCL have no password. Left alone they listen at the address that the machine's name stands for, and at the
first interface that is not a loopback one.
"""

from __future__ import annotations

import ipaddress
import os

ADDRESS = "127.0.0.1"
_INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def loopback_environment() -> dict[str, str]:
    """Variables of the processes of such a run; those that are set already stay as they are."""
    return {name: os.environ.get(name, value) for name, value in _INTERFACES.items()}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, or `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
