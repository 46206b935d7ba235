"""A program that knows an address and leads a conversation: any agent, in a process of its own.

    OPENAI_BASE_URL   http://127.0.0.1:PORT/v1
    OPENAI_API_KEY    the conversation's
    OPENAI_MODEL      the model's name there
    ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY, ANTHROPIC_MODEL    the same for clients of that kind, without /v1
    stdin             {"messages": [...], "metadata": {...}}, one line of JSON: the prompt

What it prints last says what its attempt was worth: a number, or {"reward": 1.0, "parts": {...}, "note": "..."}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.environments.conversation import Conversation, LimitReached
from pipeline.environments.endpoint.listener import Address, serve
from pipeline.environments.reward import Reward
from pipeline.rewards.environment import without_secrets
from pipeline.types import Prompt

_KEPT = 64 << 10  # bytes of what it prints, the last ones
_LAST_WORDS_S = 1.0  # that pipes of a program that has ended are read on, where another process holds them
_SHOWN = 500  # characters of its last words in a message
_FIELDS = {"reward", "parts", "note", "turns"}


class ProgramError(Exception):
    """A program did not end well, or said nothing of its reward."""


class Program:
    """The environment `environment.command`."""

    def __init__(self, command: Sequence[str], directory: Path | None = None, variables: Sequence[str] = ()):
        """directory: that it is started in; None: the run's. variables: as in run_program."""
        self.command, self.directory, self.variables = command, directory, variables

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        """Raises ProgramError, and LimitReached where a limit ended the conversation and it gave no reward."""
        try:
            async with serve(conversation) as address:
                printed = await run_program(
                    self.command, address, prompt, directory=self.directory, variables=self.variables
                )
            return reward_in(printed)
        except ProgramError as error:
            if conversation.cut is not None:
                raise LimitReached(str(error)) from error
            raise


async def run_program(
    command: Sequence[str],
    address: Address,
    prompt: Prompt,
    *,
    directory: Path | None = None,
    variables: Sequence[str] = (),
) -> str:
    """Start it, wait for its end; what it printed, its last 64 KiB. Nothing of its session outlives this call.

    variables: of this process's environment that it gets though their names look like secrets.
    Raises ProgramError where it ends with another code than 0, or cannot be started.
    """
    async with _heard() as (out, printed), _heard() as (errors, complained):
        with _told(prompt) as asked, out, errors:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asked,
                    stdout=out,
                    stderr=errors,
                    env=environment_for(address, os.environ, variables),
                    cwd=directory,
                    start_new_session=True,
                )
            except OSError as error:
                raise ProgramError(f"{command[0]} cannot be started: {error}") from error
        try:
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await asyncio.wait({printed.ended, complained.ended}, timeout=_LAST_WORDS_S)
    return _printed(command[0], code, printed.text, complained.text)


def _printed(program: str, code: int, printed: str, complained: str) -> str:
    """What it printed. Raises ProgramError where it did not end well."""
    if code != 0:
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        raise ProgramError(f"{program} ended {how}: {(complained or printed).strip()[-_SHOWN:]}")
    return printed


def which(program: str, directory: Path | None) -> str | None:
    """Where it is, as the program's own PATH has it; None: nowhere."""
    if os.sep in program:
        file = Path(directory or ".", program).absolute()  # a link stays one: the Python of a virtual environment is
        return str(file) if os.access(file, os.X_OK) and file.is_file() else None
    return shutil.which(program, path=_path(os.environ))


def environment_for(address: Address, environment: Mapping[str, str], variables: Sequence[str] = ()) -> dict[str, str]:
    """Variables of a program: none that looks like a secret but those named; `python` is this run's, and no proxy
    stands before the address."""
    inherited = without_secrets(environment, variables)
    local = {name: ",".join(filter(None, (inherited.get(name, ""), "127.0.0.1"))) for name in ("NO_PROXY", "no_proxy")}
    openai = {"OPENAI_BASE_URL": address.url, "OPENAI_API_KEY": address.key, "OPENAI_MODEL": address.model}
    own = openai | {name.replace("OPENAI", "ANTHROPIC"): value.removesuffix("/v1") for name, value in openai.items()}
    return {**inherited, **local, **openai, **own, "PATH": _path(inherited)}


def _path(inherited: Mapping[str, str]) -> str:
    return os.pathsep.join((str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)))


def reward_in(printed: str) -> Reward:
    """Of the last line that is not empty. Raises ProgramError."""
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    wanted = 'a number, or {"reward": 1.0, "parts": {...}, "note": "..."}'
    try:
        said: Any = json.loads(last)
    except (ValueError, RecursionError):
        raise ProgramError(f"the program's last line was {last[:_SHOWN]!r}, and not {wanted}") from None
    if isinstance(said, int | float) and not isinstance(said, bool):
        return Reward(float(said))
    if not isinstance(said, dict) or (unknown := set(said) - _FIELDS):
        told = last[:_SHOWN] if not isinstance(said, dict) else f"has {', '.join(sorted(unknown))}"
        raise ProgramError(f"the program's last line {told!r} is not {wanted}")
    return Reward(said.get("reward"), said.get("parts") or {}, said.get("turns"), str(said.get("note") or ""))


class _Tail(asyncio.Protocol):
    """The last bytes of a pipe. ended: done when nobody writes any more."""

    def __init__(self):
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kept = b""

    @property
    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")

    def data_received(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-_KEPT:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


@contextlib.asynccontextmanager
async def _heard() -> AsyncIterator[tuple[IO[bytes], _Tail]]:
    """A pipe's end to write into, and what comes out. Not asyncio's own: a process has ended for it when everybody
    has let go of its pipes, and a program may leave somebody behind."""
    read, write = os.pipe()
    transport, tail = await asyncio.get_running_loop().connect_read_pipe(_Tail, os.fdopen(read, "rb", 0))
    try:
        with os.fdopen(write, "wb", 0) as end:
            yield end, tail
    finally:
        transport.close()


def _told(prompt: Prompt) -> IO[bytes]:
    """The prompt as a file, which waits for nobody to read it."""
    assert prompt.opening is not None
    told = {"messages": list(prompt.opening.messages), "metadata": prompt.metadata}
    file = os.fdopen(os.memfd_create("prompt"), "w+b")
    file.write(json.dumps(told, default=str).encode() + b"\n")
    file.seek(0)
    return file
