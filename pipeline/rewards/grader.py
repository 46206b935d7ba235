"""The grader as a run holds it: questions go in, a verdict for each comes out, whatever the verifier does.

No verifier is imported or called in this process, and no thread waits for one. The processes are those of
`supervisor`; they are warm from one step to the next.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.rewards.environment import without_secrets
from pipeline.rewards.processes import MARK, kill_marked
from pipeline.rewards.protocol import (
    READY,
    REFUSED,
    Limits,
    Question,
    Verdict,
    as_verdict,
    pack_question,
    packed_in,
)
from pipeline.rewards.registry import RewardError, VerifierError, is_users_own

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig

RESTARTS = 2
"""So often the supervisor may be killed, by a verifier or by the system, during one call of `ask`."""

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.rewards.supervisor import main; main({})"
_END_S = 5.0
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Set where they are not: there are several workers, and a fork should find no threads."""


class _Gone(Exception):
    """The supervisor has ended."""


class Grader:
    """A context. It starts at once, and does not wait: the verifier is loaded while engines start."""

    def __init__(
        self,
        verifier: str,
        *,
        directory: Path | None = None,
        workers: int = 8,
        limits: Limits | None = None,
        environment: Sequence[str] = (),
    ):
        """verifier: a registered name, or package.module:function, found as this process would find it.

        directory: where its module is looked for first. workers: processes. environment: variables that verifiers
        get though their names look like secrets.
        Raises VerifierError for a name that is neither registered nor a dotted path.
        """
        is_users_own(verifier)
        self.verifier, self.workers, self.limits = verifier, workers, limits or Limits()
        self.directory = directory
        self.environment = tuple(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._next = 1

    def __enter__(self) -> Grader:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Return when the verifier is loaded. Raises VerifierError where it cannot be."""
        while not self._ready:
            try:
                self._exchange(bytearray())
            except _Gone as error:
                raise RewardError(self._how_it_ended()) from error

    def ask(self, questions: Iterable[Question]) -> list[Verdict]:
        """A verdict for each, in order; answers are graded while later ones are still being made.

        Raises VerifierError where the verifier cannot be loaded at all, RewardError where the supervisor is killed
        again and again.
        """
        numbers: list[int] = []
        open_: dict[int, bytes] = {}
        verdicts: dict[int, Verdict] = {}
        outbox = bytearray()
        restarts = 0
        source = iter(questions)
        more = True
        while more or open_:
            if more and (question := next(source, None)) is not None:
                number, self._next = self._next, self._next + 1
                numbers.append(number)
                open_[number] = pack_question(number, question)
                outbox += open_[number]
                if len(outbox) < 1 << 13:
                    continue
            else:
                more = False
            if not open_:
                break
            try:
                for number, verdict in self._exchange(outbox, wait=not more):
                    if open_.pop(number, None) is not None:  # else of a call that was interrupted
                        verdicts[number] = verdict
            except _Gone as error:
                restarts += 1
                if restarts > RESTARTS:
                    raise RewardError(f"{self._how_it_ended()}, {restarts} times in one step") from error
                self.close()
                self._start()
                outbox = bytearray(b"".join(open_.values()))
        return [verdicts[number] for number in numbers]

    def close(self) -> None:
        """End it, and all that it and its verifiers started. May be called twice."""
        if self._process is None:
            return
        self._selector.close()
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        kill_marked(self._mark)

    def _start(self) -> None:
        self._mark = secrets.token_hex(16)
        self._socket, theirs = socket.socketpair()
        environment = without_secrets(os.environ, self.environment)
        environment = dict.fromkeys(_ONE_THREAD, "1") | environment | {MARK: self._mark}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT.format(theirs.fileno()), _ROOT],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the driver's
            )
        setting = {
            "verifier": self.verifier,
            "directory": None if self.directory is None else str(self.directory),
            "workers": self.workers,
            "limits": asdict(self.limits),
            "driver": os.getpid(),
            "path": [part or os.getcwd() for part in sys.path],
        }
        self._socket.sendall(json.dumps(setting).encode() + b"\n")
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._inbox = bytearray()
        self._ready = False

    def _exchange(self, outbox: bytearray, *, wait: bool = True) -> list[tuple[int, Verdict]]:
        """Send what the socket takes of the outbox, and take what has come. wait: until either can be done.

        Raises _Gone where the supervisor has ended, VerifierError where it could not load the verifier.
        """
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if outbox else 0)
        self._selector.modify(self._socket, wanted)
        events = sum(event for _, event in self._selector.select(None if wait else 0))
        try:
            if events & selectors.EVENT_WRITE:
                del outbox[: self._socket.send(outbox)]
            if events & selectors.EVENT_READ:
                data = self._socket.recv(1 << 20)
                if not data:
                    raise _Gone
                self._inbox += data
        except ConnectionError as error:
            raise _Gone from error
        taken = []
        for number, code, reward, text in packed_in(self._inbox):
            if code == REFUSED:
                raise VerifierError(text)
            if code == READY:
                self._ready = True
            else:
                taken.append((number, as_verdict(code, reward, text)))
        return taken

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return f"the supervisor of the verifier {self.verifier!r} does not answer"
        return f"the supervisor of the verifier {self.verifier!r} ended with code {code}"


def open_grader(data: DataConfig) -> Grader:
    """The grader of a configuration. Raises VerifierError as Grader does."""
    return _grader(data, data.reward_workers)


def check_reward(data: DataConfig) -> None:
    """Load a configuration's verifier in a process of its own, and end that.

    Raises VerifierError, saying what is wrong with it: there is no such function, or importing its module raises,
    exits, crashes or hangs.
    """
    if is_users_own(data.reward):
        with _grader(data, 1) as grader:
            grader.wait_ready()


def _grader(data: DataConfig, workers: int) -> Grader:
    return Grader(
        data.reward,
        directory=data.reward_directory,
        workers=workers,
        limits=Limits(timeout_s=data.reward_timeout_s, memory_gb=data.reward_memory_gb),
        environment=data.reward_environment,
    )
