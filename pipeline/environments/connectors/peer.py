"""A program of another Python that answers lines of JSON with lines of JSON, for as long as the run lasts.

It ends when its standard input does: so it is gone when the run is, however that ended. The end of
what it writes to standard error stands in every message.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from pipeline.deaf import deaf_children
from pipeline.environments.endpoint.subprogram import which
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.rewards.environment import without_secrets

LONGEST_LINE: Final = 64 << 20  # bytes
_KEPT: Final = 16 << 10  # bytes of what it writes to standard error, the last ones
_SHOWN: Final = 600  # characters of these in a message
_running: weakref.WeakSet[Child] = weakref.WeakSet()


class ConnectorError(SamerouteError):
    """What an environment connects to cannot be used; the message says what to change."""

    exit_code = NOT_STARTED


def words_of(command: Sequence[str]) -> tuple[str, ...]:
    """A command as a person writes it; a program that stands beside this Python need not be on PATH, as with
    `environment.command`. Raises ConnectorError for one that is no list of texts."""
    if isinstance(command, str) or not command or not all(isinstance(word, str) for word in command):
        raise ConnectorError(f'a command is a list of texts, [program, "--port", "8000"], and not {command!r}')
    program, *arguments = command
    return (which(program, None) or program, *arguments)


def check_positive(**options: Any) -> None:
    """Raise ConnectorError for one that is no number above 0."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConnectorError(f"environment.options.{name}={value!r} is no number above 0; correct it")


class Child:
    """A process in a session of its own, which a run's signals do not reach, and which ends with the run."""

    def __init__(self, command: Sequence[str], what: str, *, variables: Sequence[str] = (), answers: bool = True):
        """what: it is, for messages. variables: that it gets though their names look like secrets. answers: on its
        standard output, which is else as good as its standard error. Raises ConnectorError where it cannot be
        started."""
        self.what = what
        self._words = b""
        try:
            with deaf_children():
                self.process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE if answers else subprocess.STDOUT,
                    env=without_secrets(os.environ, variables),
                    start_new_session=True,
                )
        except OSError as error:
            raise ConnectorError(f"{what}: {command[0]} cannot be started: {error.strerror or error}") from error
        _running.add(self)
        self._listener = threading.Thread(target=self._hear, name=f"sameroute {what}", daemon=True)
        self._listener.start()

    def _hear(self) -> None:
        words = self.process.stderr or self.process.stdout
        assert words is not None
        while part := os.read(words.fileno(), 1 << 16):
            self._words = (self._words + part)[-_KEPT:]

    @property
    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return self._words.decode("utf-8", "replace").strip()[-_SHOWN:] or "it said nothing"

    def ended(self) -> str:
        """How it ended, in words; what it started ends too."""
        self.close()
        self._listener.join(1.0)
        code = self.process.wait()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return f"{self.what} ended {how}: {self.last_words}"

    def close(self) -> None:
        """End it, with all of its session. May be called twice."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@atexit.register
def _close_all() -> None:
    for child in list(_running):
        child.close()


class Peer:
    """Questions to a child, and its answers, from any thread and event loop."""

    def __init__(self, child: Child, *, within_s: float):
        """Waits for its first line, {"ready": ...}. Raises ConnectorError where it says {"error": ...}, ends, or says
        nothing in time."""
        self.child = child
        self._numbers, self._one = itertools.count(1), threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._why: str | None = None
        self._ready: Future[dict[str, Any]] = Future()
        threading.Thread(target=self._listen, name=f"sameroute {child.what}", daemon=True).start()
        try:
            hello = self._ready.result(within_s)
        except TimeoutError:
            child.close()
            raise ConnectorError(
                f"{child.what} was not ready within {within_s:g} s (environment.options.start_timeout_s): "
                f"{child.last_words}"
            ) from None
        if "error" in hello:
            child.close()
            raise ConnectorError(str(hello["error"]))

    @property
    def alive(self) -> bool:
        return self._why is None

    async def ask(self, **question: Any) -> Any:
        """The answer. Raises ConnectorError with the child's reason, or where it has ended; who is cancelled cancels
        the work there."""
        number, answer = next(self._numbers), Future()
        with self._one:
            if self._why is not None:
                raise ConnectorError(self._why)
            self._asked[number] = answer
        try:
            self._tell({"id": number} | question)
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._tell({"cancel": number})
            raise
        finally:
            self._asked.pop(number, None)

    def _tell(self, line: Mapping[str, Any]) -> None:
        stdin = self.child.process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError), self._one:  # one that is gone is heard of by its end
            stdin.write(json.dumps(line, default=str).encode() + b"\n")
            stdin.flush()

    def _listen(self) -> None:
        """Hand out answers until it ends, or says what nobody understands."""
        stdout = self.child.process.stdout
        assert stdout is not None
        why = None
        while line := stdout.readline(LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) == LONGEST_LINE:
                why = f"{self.child.what} wrote a line of more than {LONGEST_LINE >> 20} MiB"
                break
            try:
                told: Any = json.loads(line)
                if not self._ready.done():
                    self._ready.set_result(dict(told))
                    continue
                answer = self._asked.get(told["id"])
            except (ValueError, KeyError, TypeError):
                why = f"{self.child.what} wrote what is no answer: {line[:200].decode('utf-8', 'replace').strip()!r}"
                break
            if answer is not None and not answer.done():
                self._hand_out(answer, told)
        self._end(why)

    @staticmethod
    def _hand_out(answer: Future[Any], told: Mapping[str, Any]) -> None:
        with contextlib.suppress(Exception):  # cancelled meanwhile
            if "error" in told:
                answer.set_exception(ConnectorError(str(told["error"])))
            else:
                answer.set_result(told.get("answer"))

    def _end(self, why: str | None) -> None:
        said = self.child.ended()
        with self._one:
            self._why = why or said
            left = list(self._asked.values())
        if not self._ready.done():
            self._ready.set_exception(ConnectorError(self._why))
        for answer in left:
            if not answer.done():
                self._hand_out(answer, {"error": self._why})
