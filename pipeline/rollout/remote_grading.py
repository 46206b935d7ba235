"""Answers graded beside the servers: token ids go there, verdicts come back, and no text is made in this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from pipeline.cluster.placement import on_node
from pipeline.errors import SamerouteError
from pipeline.rewards import RewardError, Verdict
from pipeline.rewards.grader import RESTARTS, surroundings_of
from pipeline.rollout.grader_process import GraderProcess, Said, pack_answer
from pipeline.say import to_stderr
from pipeline.types import Episode, Prompt

if TYPE_CHECKING:
    from pipeline.config.rewards import GradingConfig, RewardConfig

_CALLS = 1000  # at once in a grader process
_GATHER_S = 0.002
"""Answers of so many seconds are asked about together."""
_END_S = 15.0  # that a grader and its verifiers may take to end
_HANGS_S = 150.0  # without a verdict, and as long once more without a sign of life: the process hangs


class GraderHost:
    """A grader process, as the controller has it; one that died is made again, with the graders that it had."""

    def __init__(self, node: str | None, model_path: Path, trust_remote_code: bool):
        """node: of Ray, where it runs while that is there; None: anywhere. Else as GraderProcess."""
        self._node, self._arguments = node, (model_path.resolve(), trust_remote_code)
        self._graders: dict[int, tuple[Any, ...]] = {}
        self.actor = self._started()

    def _started(self) -> Any:
        actor: Any = ray.remote(GraderProcess)
        options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": _CALLS}
        started = actor.options(**options, **on_node(self._node, or_elsewhere=True)).remote(*self._arguments)
        for key, setting in self._graders.items():
            started.open.remote(key, *setting)
        return started

    def open(self, key: int, *setting: Any) -> None:
        """Start a grader, see GraderProcess.open; does not wait."""
        self._graders[key] = setting
        self.actor.open.remote(key, *setting)

    def close(self, key: int) -> None:
        """End it; one that is gone is no error."""
        del self._graders[key]
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(self.actor.close.remote(key), timeout=_END_S)

    def died(self, actor: Any, error: RayActorError) -> None:
        """Another takes its place, where nobody has seen that before."""
        if self.actor is actor:
            to_stderr(f"a grader process died and is started again, its open answers are graded again: {error}")
            ray.kill(actor)  # one that cannot be reached may live
            self.actor = self._started()

    def stop(self) -> None:
        """End the process; never raises for one that is gone."""
        ray.kill(self.actor)


class RemoteGraders:
    """See Graders. hosts: that share the answers."""

    def __init__(self, hosts: Sequence[GraderHost]):
        self._hosts, self._keys = list(hosts), itertools.count()

    @contextlib.contextmanager
    def open(self, rewards: Sequence[RewardConfig], grading: GradingConfig) -> Iterator[RemoteGrading]:
        """As Graders.open, on every host. Variables of the environment and the module path are this process's."""
        key, around = next(self._keys), surroundings_of(rewards, grading)
        with contextlib.ExitStack() as stack:
            for host in self._hosts:
                host.open(key, tuple(rewards), grading, around)
                stack.callback(host.close, key)
            yield RemoteGrading(self._hosts, key)


@contextlib.contextmanager
def remote_graders(nodes: Sequence[str | None], model_path: Path, trust_remote_code: bool) -> Iterator[RemoteGraders]:
    """A grader process on each of these nodes of Ray, which must be up; they end with the block."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for node in nodes:
            hosts.append(GraderHost(node, model_path, trust_remote_code))
            stack.callback(hosts[-1].stop)
        yield RemoteGraders(hosts)


class RemoteGrading:
    """See Grading."""

    def __init__(self, hosts: Sequence[GraderHost], key: int):
        self._hosts, self._key = hosts, key
        self._numbers = itertools.count()  # a verdict on what an earlier judge gave up is known as such

    def judge(self) -> RemoteJudge:
        """As Grading.judge."""
        return RemoteJudge([_Line(host, self._key) for host in self._hosts], self._numbers)

    def ask(self, answers: Iterable[tuple[Prompt, Episode]]) -> list[Verdict]:
        """As Grading.ask, for a caller without an event loop."""
        found: list[Verdict] = []

        # asyncio.run would format what it returns, when it puts the interrupt handler back.
        async def run() -> None:
            async with self.judge() as judge:
                found.extend(await asyncio.gather(*(judge.ask(*answer) for answer in answers)))

        asyncio.run(run())
        return found


class RemoteJudge:
    """See Judge: each answer goes to the host that has fewest."""

    def __init__(self, lines: Sequence[_Line], numbers: Iterator[int]):
        self._lines, self._numbers = lines, numbers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in self._lines:
            await line.close()

    async def ask(self, prompt: Prompt, episode: Episode) -> Verdict:
        """As Judge.ask."""
        number = next(self._numbers)
        line = min(self._lines, key=lambda line: len(line.open))
        return await line.ask(number, pack_answer(number, prompt, episode))


class _Line:
    """From one judge to a grader of one host. open: answers that wait for a verdict.

    Verdicts come with `exchange`, of which one is always under way while an answer is open.
    """

    def __init__(self, host: GraderHost, key: int):
        self._host, self._key = host, key
        self.open: dict[int, tuple[bytes, asyncio.Future[Verdict]]] = {}
        self._unsent: list[bytes] = []
        self._sending: asyncio.Handle | None = None
        self._exchanges: set[asyncio.Task[None]] = set()
        self._dead: Any = None
        self._deaths = 0
        self._asked_again: set[int] = set()
        """Answers that were open when it last died: while they are, another death counts with that."""

    async def ask(self, number: int, packed: bytes) -> Verdict:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Verdict] = loop.create_future()
        self.open[number] = packed, future
        self._unsent.append(packed)
        if self._sending is None:
            self._sending = loop.call_later(_GATHER_S, self._send)
        try:
            return await future
        finally:
            self.open.pop(number, None)

    async def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
        for task in self._exchanges:
            task.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        for _, future in self.open.values():
            future.cancel()

    def _send(self) -> None:
        self._sending, packed = None, self._unsent
        self._unsent = []
        task = asyncio.create_task(self._exchange(packed))
        self._exchanges.add(task)
        task.add_done_callback(self._exchanged)

    def _exchanged(self, task: asyncio.Task[None]) -> None:
        self._exchanges.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            for _, future in self.open.values():
                if not future.done():
                    future.set_exception(error)
        elif not task.cancelled() and self.open and not self._exchanges and self._sending is None:
            self._send()

    async def _exchange(self, packed: list[bytes]) -> None:
        actor = self._host.actor
        try:
            self._hear(await _while_it_lives(actor, actor.exchange.remote(self._key, packed)))
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            self._ask_again(actor, error)

    def _hear(self, said: Sequence[Said]) -> None:
        for number, verdict in said:
            self._asked_again.discard(number)
            if number not in self.open or (future := self.open[number][1]).done():  # its caller has gone
                continue
            if isinstance(verdict, SamerouteError):
                future.set_exception(verdict)
            else:
                future.set_result(verdict)
        if not self._asked_again:
            self._deaths = 0

    def _ask_again(self, actor: Any, error: RayActorError) -> None:
        """It died. Raises RewardError where it did so too often."""
        if actor is self._dead:  # another exchange has found out
            return
        self._dead = actor
        self._host.died(actor, error)
        self._deaths += 1
        if self._deaths > RESTARTS:
            raise RewardError(f"a grader process died {self._deaths} times for the same answers: {error}") from error
        self._asked_again = set(self.open)
        self._unsent = [packed for packed, _ in self.open.values()]
        if self._sending is not None:
            self._sending.cancel()
        self._send()


async def _while_it_lives[T](actor: Any, call: Awaitable[T]) -> T:
    """The answer of a grader process to a call, however long that takes. One that hangs is ended, as RayActorError
    tells who waits."""
    answer = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({answer}, timeout=_HANGS_S))[0]:
            sign = asyncio.ensure_future(actor.lives.remote())
            sign.add_done_callback(lambda done: done.cancelled() or done.exception())  # who died, `answer` says
            if not (await asyncio.wait({sign, answer}, timeout=_HANGS_S, return_when=asyncio.FIRST_COMPLETED))[0]:
                ray.kill(actor)
        return await answer
    finally:
        answer.cancel()
