"""A process that has made its imports and forks those that need them: a server starts in a third of the time.

The imports of an engine are ten seconds of a processor, the same ones for each process. Where `FORKS_VARIABLE` names
the socket of a process that has made them (`serve`), one that is to become an engine asks it (`ask`): it hands over
its arguments, environment, folder and streams, waits, and ends as the child ends (`end_as`). The child is what the
asking process would have become, in a session of its own: /proc shows its environment, its title can be changed, and
when the process that asked is gone, even by SIGKILL, it learns that (`Forked.follow`).

It is for processes without a GPU: CUDA does not survive a fork. A run on a CPU sets the variable for its servers, and
tests for all of theirs.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

FORKS_VARIABLE = "SAMEROUTE_FORKS"
ROOM = {"SAMEROUTE_FORKS_ROOM": "x" * 100_000}
"""Environment of a process that serves: /proc shows a child's own where this one stood, so there must be room."""

_STREAMS = (0, 1, 2)
_COMES_S = 10.0  # in which a process that was started comes to listen
_environ: list[ctypes.Array] = []  # what C's environ points to
_LENGTH, _STATUS = struct.Struct("!Q"), struct.Struct("!q")


class ForkError(RuntimeError):
    """The process that forks is not there, or its imports were made under another environment."""


@dataclass(frozen=True)
class Forked:
    """What a child was asked for. asker: the connection to who asked; it ends when that process does."""

    arguments: list[str]
    asker: socket.socket

    def follow(self, leave: Callable[[], None]) -> None:
        """From now on call `leave` in a thread when the process that asked is gone."""

        def watch() -> None:
            self.asker.recv(1)  # it sends nothing: this returns at its end
            leave()

        threading.Thread(target=watch, daemon=True).start()


def ask(path: str, arguments: list[str]) -> int:
    """Let the process that listens at `path` fork one with these arguments, and wait for its end.

    Returns its exit code, -n where signal n ended it. Raises ForkError where it cannot be had.
    """
    with request(path, arguments, dict(os.environ), _STREAMS) as connection:
        return ended(path, connection)


def request(path: str, arguments: list[str], environment: dict[str, str], streams: Sequence[int]) -> socket.socket:
    """Let the process that listens at `path` fork one with these arguments, and do not wait for it.

    streams: its standard input, output and error. Returns the connection by which its end is told (`ended`); where
    that is closed, the process learns it (`Forked.follow`). Raises ForkError where it cannot be had.
    """
    body = json.dumps({"arguments": arguments, "environment": environment, "folder": os.getcwd()}).encode()
    connection = socket.socket(socket.AF_UNIX)
    try:
        _connect(connection, path)
        socket.send_fds(connection, [_LENGTH.pack(len(body))], streams)
        connection.sendall(body)
    except OSError as error:
        connection.close()
        raise ForkError(f"no process forks at {path}: {error}") from error
    return connection


def _connect(connection: socket.socket, path: str) -> None:
    """Waits for a process that has just been started, and has not yet come to listen."""
    deadline = time.monotonic() + _COMES_S
    while True:
        try:
            return connection.connect(path)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def ended(path: str, connection: socket.socket) -> int:
    """Wait, as long as the connection's time-out says, for the end of the process that was requested; its exit code, -n
    where signal n ended it. Raises TimeoutError, and ForkError where the process that forks is gone."""
    try:
        answer = _receive(connection, _STATUS.size)
    except TimeoutError:
        raise
    except OSError as error:
        raise ForkError(f"no process forks at {path}: {error}") from error
    (status,) = _STATUS.unpack(answer)
    return os.waitstatus_to_exitcode(status)


def end_as(code: int) -> NoReturn:
    """End this process as one ended whose exit code `ask` has returned, by a signal too."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: Path, keeper: int, imports: Callable[[], None], reads: Sequence[str]) -> Forked:
    """Make the imports, then fork a child a request for as long as the process `keeper` lives.

    reads: variables that the imports read: a child must have them as this process has.
    Returns in each child, and only there; in this process it ends with SystemExit. Start it with `ROOM` in its
    environment. Raises ForkError where the imports leave a thread, which no child would have.
    """
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as events:
        listener.bind(str(path))
        listener.listen(64)  # from here on requests wait
        end = os.pidfd_open(keeper)
        before = dict(os.environ)
        imports()
        if len(threads := os.listdir("/proc/self/task")) > 1:
            raise ForkError(f"the imports have started {len(threads) - 1} threads")
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
        events.register(listener, selectors.EVENT_READ)
        events.register(end, selectors.EVENT_READ)
        while True:
            for event, _ in events.select():
                if event.fileobj == end:
                    raise SystemExit
                if event.fileobj != listener:
                    _tell(events, event)
                    continue
                connection, _ = listener.accept()
                request, streams = _read(connection)
                child = os.fork()
                if child == 0:
                    _forget(events)
                    _take(streams)
                    _check(before, request["environment"], reads)
                    return _become(request, changed, connection)
                for stream in streams:
                    os.close(stream)
                events.register(os.pidfd_open(child), selectors.EVENT_READ, (child, connection))


def _tell(events: selectors.BaseSelector, event: selectors.SelectorKey) -> None:
    """The child has ended: its status goes to who asked for it."""
    child, connection = event.data
    _, status = os.waitpid(child, 0)
    events.unregister(event.fileobj)
    os.close(event.fd)
    with connection:
        try:
            connection.sendall(_STATUS.pack(status))
        except BrokenPipeError:  # who asked has gone before
            return


def _forget(events: selectors.BaseSelector) -> None:
    """A child needs none of what other children are known by."""
    for other in list(events.get_map().values()):
        if isinstance(other.fileobj, int):
            os.close(other.fileobj)
        if other.data is not None:
            other.data[1].close()


def _take(streams: list[int]) -> None:
    for stream, number in zip(streams, _STREAMS, strict=True):
        os.dup2(stream, number)
        os.close(stream)


def _check(had: Mapping[str, str], asked: Mapping[str, str], reads: Sequence[str]) -> None:
    for name in reads:
        if had.get(name) != asked.get(name):
            raise ForkError(
                f"the imports were made with {name}={had.get(name)}, this process is to have {asked.get(name)}"
            )


def _become(request: dict, changed: Mapping[str, str], connection: socket.socket) -> Forked:
    """changed: what the imports have set, as they would have here."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"] | changed)
    _show_environment()
    os.chdir(request["folder"])
    tempfile.tempdir = None  # it was read from another environment
    return Forked(request["arguments"], connection)


def _show_environment() -> None:
    """Let /proc/PID/environ, by which processes are found, be os.environ; a fork's is that of who forked it.

    The C library's `environ` points into it, as in a process that was executed: by that, what changes a process's
    title finds its place.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(field) for field in fields[47:49])  # env_start and env_end, see proc(5)
    entries = [f"{name}={value}\0".encode() for name, value in os.environ.items()]
    places = [start + offset for offset in accumulate(map(len, entries), initial=0)]
    if places[-1] > end:
        raise ForkError(f"an environment of {places[-1] - start} bytes has {end - start} here")
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, b"".join(entries), places[-1] - start)
    array = (ctypes.c_void_p * len(places))(*places[:-1], None)
    _environ.append(array)
    ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ").value = ctypes.addressof(array)


def _read(connection: socket.socket) -> tuple[dict, list[int]]:
    header, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, len(_STREAMS))
    (length,) = _LENGTH.unpack(header)
    return json.loads(_receive(connection, length)), streams


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionError("it ended meanwhile")
        data += part
    return data
