"""The server that forks trainer ranks, itself forked from a process that has made its imports."""

from __future__ import annotations

import importlib
import os
import socket
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path


def start_forkserver(log: Path) -> None:
    """As multiprocessing (3.12) starts its own when first asked, but for the imports. Call it before threads start.

    log: what ranks print goes there.
    """
    resource_tracker.ensure_running()
    address = connection.arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        alive, ours = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _serve(listener.fileno(), alive, log)
        os.close(alive)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, ours, pid


def _serve(listener: int, alive: int, log: Path) -> None:
    """It holds none of the asking process's pipes, whose ends somebody waits for. Does not return."""
    with open(os.devnull, "rb") as nothing, log.open("wb") as file:
        os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        importlib.import_module("tests.support.preload")
        forkserver.main(listener, alive, [])
    finally:
        os._exit(0)
