"""The grader as a run holds it: questions go in, a verdict for each comes out, whatever the verifier does.

Each question goes to every component, side by side; the reward is their weighted sum. No verifier is imported or called
in this process, and no thread waits for one. The processes are those of `supervisor`; they are warm from one step to
the next.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.rewards.environment import without_secrets
from pipeline.rewards.processes import MARK, kill_marked
from pipeline.rewards.protocol import (
    LARGEST,
    READY,
    REFUSED,
    Limits,
    Question,
    Verdict,
    address,
    messages_in,
    pack_question,
)
from pipeline.rewards.registry import Component, RewardError, VerifierError, is_quick, title
from pipeline.waiting import Waiting

if TYPE_CHECKING:
    from pipeline.config.rewards import GradingConfig, RewardConfig

RESTARTS = 2
"""So often the supervisor may be killed, by a verifier or by the system, during one call of `ask`."""

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.rewards.supervisor import main; main({})"
_END_S = 5.0
_CONNECT_S = 5.0
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Set where they are not: there are several workers, and a fork should find no threads."""


class _Gone(Exception):
    """The supervisor has ended."""


@dataclass(frozen=True)
class Surroundings:
    """What verifiers find around them: variables of the environment, where modules are looked for, and the working
    folder."""

    variables: Mapping[str, str]
    path: tuple[str, ...]
    folder: str

    @classmethod
    def here(cls, allowed: Sequence[str] = ()) -> Surroundings:
        """This process's, without secrets. allowed: variables that go along though their names look like some."""
        variables, path = without_secrets(os.environ, allowed), tuple(part or os.getcwd() for part in sys.path)
        return cls(variables, path, os.getcwd())


class Grader:
    """A context. It starts at once, and does not wait: verifiers are loaded while engines start."""

    def __init__(
        self,
        components: str | Sequence[Component],
        *,
        workers: int = 8,
        limits: Limits | None = None,
        surroundings: Surroundings | None = None,
    ):
        """components: the verifiers; a text is the short form of one.

        workers: processes. surroundings: that they have; None: this process's. Raises VerifierError for a text that
        names none.
        """
        self.components = (Component.named(components),) if isinstance(components, str) else tuple(components)
        self.workers, self.limits = workers, limits or Limits()
        self.surroundings = surroundings or Surroundings.here()
        self._process: subprocess.Popen[bytes] | None = None
        self._next = 1

    def __enter__(self) -> Grader:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Return when the verifiers are loaded; a slow import is said. Raises VerifierError where one cannot be."""
        with Waiting().during("its import", lambda: title(self.components)):
            while not self._ready:
                try:
                    self._exchange(bytearray())
                except _Gone as error:
                    raise RewardError(self._how_it_ended()) from error

    def ask(self, questions: Iterable[Question]) -> list[Verdict]:
        """A verdict for each, in order, of all components together; answers are graded while later ones are being made.

        Raises VerifierError where the verifier cannot be loaded at all, RewardError where the supervisor is killed
        again and again.
        """
        asked: list[tuple[Question, list[int]]] = []
        open_: dict[int, bytes] = {}
        verdicts: dict[int, Verdict] = {}
        outbox = bytearray()
        restarts = 0
        source = iter(questions)
        more = True
        while more or open_:
            if more and (question := next(source, None)) is not None:
                parts = self.parts(question)
                asked.append((question, list(parts)))
                open_ |= parts
                outbox += b"".join(parts.values())
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
        return [self.together(question, [verdicts[number] for number in numbers]) for question, numbers in asked]

    def parts(self, question: Question) -> dict[int, bytes]:
        """A question to every component that grades its source, as it is sent: number -> bytes, in the order of the
        components. Raises RewardError where none does."""
        packed, parts = pack_question(question), {}
        for component in self._graders(question):
            parts[self._next] = address(self._next, component, packed)
            self._next += 1
        if not parts:
            raise RewardError(f"no verifier grades the source {question.prompt.source!r}")
        return parts

    def _graders(self, question: Question) -> list[int]:
        """Numbers of the components that grade its source."""
        return [n for n, component in enumerate(self.components) if component.grades(question.prompt.source)]

    def together(self, question: Question, verdicts: Sequence[Verdict]) -> Verdict:
        """Of the verdicts on a question, in the order of `parts`: the weighted sum of rewards, or the first failure."""
        own = [self.components[number] for number in self._graders(question)]
        pairs = list(zip(own, verdicts, strict=True))
        named = [replace(verdict, verifier=component.title) for component, verdict in pairs]
        reward, said = None, next((verdict for verdict in named if verdict.kind is not None), Verdict())
        if said.kind is None:
            reward = math.fsum(c.weight * v.reward for c, v in pairs if v.reward is not None)
            if not abs(reward) <= LARGEST:
                what = f"with its weight makes the reward {reward:g}, which is no finite number of float32"
                reward, said = None, Verdict(kind="not_a_number", what=what, verifier=named[0].verifier)
        return Verdict(
            reward=reward,
            kind=said.kind,
            what=said.what,
            seconds=max(verdict.seconds for verdict in verdicts),
            verifier=said.verifier,
            parts={component.name: verdict for component, verdict in zip(own, named, strict=True)},
            response=question.response_text,
        )

    def exchange(self, outbox: bytearray) -> list[tuple[int, Verdict]] | None:
        """Without waiting: send what the socket takes of the outbox, and take what has come. None where the supervisor
        has ended, until `restart`. Raises VerifierError where it could not load the verifier."""
        try:
            return self._exchange(outbox, wait=False)
        except _Gone:
            return None

    def restart(self, times: int) -> None:
        """A new supervisor in the place of one that has ended for the n-th time. Raises RewardError for too many."""
        if times > RESTARTS:
            raise RewardError(f"{self._how_it_ended()}, {times} times for the same answers")
        self.close()
        self._start()

    def fileno(self) -> int:
        """Of the socket to the supervisor; another after a restart."""
        return self._socket.fileno()

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
        environment = dict.fromkeys(_ONE_THREAD, "1") | dict(self.surroundings.variables) | {MARK: self._mark}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT.format(theirs.fileno()), _ROOT],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                cwd=self.surroundings.folder,
                start_new_session=True,  # Ctrl-C is the driver's
            )
        setting = {
            "components": [asdict(component) for component in self.components],
            "workers": self.workers,
            "limits": asdict(self.limits),
            "driver": os.getpid(),
            "path": list(self.surroundings.path),
        }
        self._socket.sendall(json.dumps(setting).encode() + b"\n")
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._inbox = bytearray()
        self._ready = False

    def _exchange(self, outbox: bytearray, *, wait: bool = True) -> list[tuple[int, Verdict]]:
        """Send what the socket takes of the outbox, and take what has come. wait: until either can be done.

        Raises _Gone where the supervisor has ended, VerifierError where it could not load a verifier.
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
        for message in messages_in(self._inbox):
            if message.code == REFUSED:
                raise VerifierError(message.text)
            if message.code == READY:
                self._ready = True
            else:
                taken.append((message.number, message.verdict))
        return taken

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return f"the supervisor of {title(self.components)} does not answer"
        return f"the supervisor of {title(self.components)} ended with code {code}"


def open_grader(
    rewards: Sequence[RewardConfig], grading: GradingConfig, surroundings: Surroundings | None = None
) -> Grader:
    """The grader of a configuration. surroundings: of its verifiers; None: this process's."""
    return _grader(rewards, grading, grading.workers, surroundings)


def surroundings_of(rewards: Sequence[RewardConfig], grading: GradingConfig) -> Surroundings:
    """Those that this process has for the verifiers of a configuration."""
    return Surroundings.here((*grading.environment, *(name for reward in rewards for name in reward.variables)))


def check_rewards(rewards: Sequence[RewardConfig], grading: GradingConfig) -> None:
    """Load a configuration's verifiers in a process of their own, and end that; a sandbox is tried.

    Raises VerifierError, saying what is wrong with one: there is no such function, importing its module raises, exits,
    crashes or hangs, its sandbox cannot be had, or nothing listens at its URL.
    """
    for reward in rewards:
        for url in reward.servers:
            _check_reachable(url, reward.metric)
    grader = _grader(rewards, grading, 1)
    if not all(map(is_quick, grader.components)):
        with grader:
            grader.wait_ready()


def _check_reachable(url: str, name: str) -> None:
    """Raise VerifierError where nothing listens at a URL, which every answer would otherwise wait for in vain."""
    there = urlsplit(url)
    try:
        port = there.port or (443 if there.scheme == "https" else 80)
        socket.create_connection((there.hostname or "", port), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        words = f"the verifier {name!r} asks {url}, which cannot be reached: {error}"
        raise VerifierError(f"{words}; start that server first, or correct its url") from error


def _grader(
    rewards: Sequence[RewardConfig], grading: GradingConfig, workers: int, surroundings: Surroundings | None = None
) -> Grader:
    return Grader(
        [_component(reward, grading) for reward in rewards],
        workers=workers,
        limits=Limits(timeout_s=grading.timeout_s, memory_gb=grading.memory_gb),
        surroundings=surroundings or surroundings_of(rewards, grading),
    )


def _component(reward: RewardConfig, grading: GradingConfig) -> Component:
    settings = reward.model_dump(mode="json", exclude={"name", "weight", "timeout_s", "sources"})
    return Component(reward.metric, settings, reward.weight, reward.limit_s(grading.timeout_s), reward.sources)
