"""How a person tells a run of servers that are to join or leave: files of RUN/servers, read after each step.

    000001.asked.json    what is asked
    000001.done.json     the same, and what came of it
    now.json             the servers of the run as they were after its last step

Each is there whole or not at all, on any file system that the run and the person share.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.engine.joining.join import MembershipError
from pipeline.engine.keys import ServerKeys
from pipeline.errors import NOT_STARTED

FOLDER = "servers"
_NOW = "now.json"
_NAME = re.compile(r"(\d+)\.(asked|done)\.json")


class ServerRequestError(MembershipError):
    """What is asked for cannot be meant."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class ServerRequest:
    """number: of the request. url: of the server. keys: the file with those that open it. log: its log. words: what
    came of it, where that is known; refused: it was not done."""

    number: int
    action: Literal["add", "remove"]
    url: str
    keys: str | None = None
    log: str | None = None
    words: str | None = None
    refused: bool = False


def ask(run: Path, action: Literal["add", "remove"], url: str, keys: Path | None, log: Path | None) -> ServerRequest:
    """Leave a request for a run. keys: needed for a server that is not the run's own. Raises ServerRequestError."""
    if not re.fullmatch(r"https?://[^/\s]+/?", url):
        raise ServerRequestError(f"{url!r} is no address of a server; write http://HOST:PORT")
    if keys is not None:
        read_keys(keys)
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    number = 1 + max((int(found[1]) for f in folder.iterdir() if (found := _NAME.fullmatch(f.name))), default=0)
    keys_path, log_path = (None if path is None else str(path.resolve()) for path in (keys, log))
    request = ServerRequest(number, action, url.rstrip("/"), keys_path, log_path)
    _write(folder / f"{number:06d}.asked.json", asdict(request))
    return request


def waiting(run: Path) -> list[ServerRequest]:
    """Requests that have no answer yet, in the order in which they came."""
    return [ServerRequest(**json.loads(file.read_text())) for file in sorted((run / FOLDER).glob("*.asked.json"))]


def answer(run: Path, request: ServerRequest, words: str, *, refused: bool) -> None:
    """Say what came of a request."""
    told = replace(request, words=words, refused=refused)
    _write(run / FOLDER / f"{request.number:06d}.done.json", asdict(told))
    (run / FOLDER / f"{request.number:06d}.asked.json").unlink()


def withdraw(run: Path, request: ServerRequest) -> None:
    """Nobody will answer it."""
    (run / FOLDER / f"{request.number:06d}.asked.json").unlink(missing_ok=True)


def answered(run: Path, request: ServerRequest) -> ServerRequest | None:
    """What came of a request; None: nothing yet."""
    file = run / FOLDER / f"{request.number:06d}.done.json"
    return ServerRequest(**json.loads(file.read_text())) if file.exists() else None


def write_now(run: Path, servers: Sequence[dict[str, Any]]) -> None:
    """The servers of a run as they are."""
    (run / FOLDER).mkdir(exist_ok=True)
    _write(run / FOLDER / _NOW, list(servers))


def read_now(run: Path) -> list[dict[str, Any]]:
    """As a run last wrote them; none where it has come to no step."""
    file = run / FOLDER / _NOW
    return json.loads(file.read_text()) if file.exists() else []


def read_keys(file: Path) -> ServerKeys:
    """Of a file that only its owner can read. Raises ServerRequestError."""
    try:
        if file.stat().st_mode & 0o077:
            raise ServerRequestError(f"others can read the keys in {file}; write chmod 600 {file}")
        return ServerKeys.from_bytes(file.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ServerRequestError(
            f"{file} holds no keys of a server ({error}); `sameroute servers RUN --start` writes such a file"
        ) from error


def write_keys(file: Path, keys: ServerKeys) -> None:
    """That only its owner can read."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(keys.to_bytes())


def _write(file: Path, content: Any) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
