"""All trainer ranks asked at once, and the wait for their answers: an end when one dies or hangs, and who it was."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.cluster.ray_processes import ended, what_died
from pipeline.errors import SamerouteError
from pipeline.waiting import START_S, Waiting

POLL_S = 1.0  # how often a waiting call looks at whether everything still lives
ANSWER_S = 5.0  # in which a rank that is busy, but runs, says where it is
_STARTING = ("meeting_point", "build")
_TOGETHER = ("build", "load", "measure", "update_policy", "update_critic", "update_supervised", "resume")
"""What ranks compute with one another, or what comes just before: where one fails, the others wait for it in a
collective, and answer nothing."""


class TrainerError(SamerouteError):
    """A trainer rank failed or died; the message names it and its log. silent: ranks that answered nothing then."""

    silent: tuple[str, ...] = ()


class RankDiedError(TrainerError):
    """A trainer rank, or Ray with all ranks, died."""


class Ranks:
    """ranks: actors of TrainerRank, by number. timeout_s: of one call; weights_timeout_s: without progress of a stream
    of weights. watch: called every second while a call waits; raises to end it."""

    def __init__(self, ranks: Sequence[Any], log_directory: Path, timeout_s: float, watch: Callable[[], None]):
        self.ranks, self.log_directory = ranks, log_directory
        self.timeout_s = self.weights_timeout_s = timeout_s
        self.watch, self.waiting = watch, Waiting()
        self._failure: TrainerError | None = None  # after which no call can be answered by all
        self._numbers, self._under_way = itertools.count(), set[int]()  # of calls, in the order in which they came

    def log_path(self, rank: int) -> Path:
        """Of a rank."""
        return rank_log(self.log_directory, rank)

    @staticmethod
    def _check_ray() -> None:
        if words := ended():
            raise RankDiedError(words)

    def _put(self, value: Any) -> ray.ObjectRef:
        """A value for all ranks, in the object store once."""
        self._check_ray()
        return ray.put(value)

    def _ask(self, ranks: Sequence[Any], method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """`method` of these ranks begins. References to its answers, in their order."""
        self._check_ray()
        return [getattr(rank, method).remote(*args, **kwargs) for rank in ranks]

    def give_up(self, why: BaseException) -> None:
        """The run ends, so that nobody reads an answer: what any thread waits for ends too, but saves."""
        self._failure = self._failure or TrainerError(f"the run has ended: {str(why) or type(why).__name__}")

    def _wait(self, answers: list[Any], method: str, timeout_s: float | None = None, **how: Any) -> list[Any]:
        """Wait for all, but not longer than for the first failure, of another thread's call too.

        how: ranks: who was asked, in the order of the answers; None: the first ones. restart: the time begins when
        ranks have answered what came before, and anew while they get on. watched: look after the servers, and say who
        is waited for; else ranks answer beside all that they do, and whatever has failed there.
        """
        number = next(self._numbers)
        if how.get("watched", True):
            self._under_way.add(number)
        try:
            return self._answered(answers, method, timeout_s, number, **how)
        except TrainerError as error:
            if method in _TOGETHER or isinstance(error, RankDiedError):
                self._failure = self._failure or error
            raise
        finally:
            self._under_way.discard(number)

    def _answered(
        self,
        answers: list[Any],
        method: str,
        timeout_s: float | None,
        number: int,
        *,
        restart: bool = False,
        watched: bool = True,
        ranks: Sequence[int] | None = None,
    ) -> list[Any]:
        """See _wait. number: of this call."""
        timeout_s, positions = timeout_s or self.timeout_s, dict[int, int | None]()
        deadline, pending, results = time.monotonic() + timeout_s, list(answers), {}
        limit_s = self.weights_timeout_s if restart else timeout_s
        wait = self.waiting.begin(method, START_S if method in _STARTING else None, limit_s)
        asked = dict(zip(answers, range(len(answers)) if ranks is None else ranks, strict=True))
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            self._check_ray()
            failed = dict[int, RayError]()
            for answer in done:
                try:
                    results[answer] = ray.get(answer)
                except RayError as error:
                    failed[asked[answer]] = error
            if failed:  # one that died leaves the others waiting in a collective
                raise self._raised(method, failed, [asked[p] for p in pending])
            if pending and watched and (failure := self._failure) is not None:
                raise type(failure)(str(failure)) from failure
            if watched:
                self.watch()
            if watched and pending:
                wait.look(lambda: self._awaited([asked[p] for p in pending]))  # noqa: B023  (called at once)
            if restart and min(list(self._under_way)) < number:
                deadline = time.monotonic() + timeout_s
            elif pending and time.monotonic() > deadline:
                before, positions = positions, self._positions([asked[p] for p in pending])
                if not restart or None in positions.values() or positions == before:
                    raise TrainerError(self._stalled(positions, method, timeout_s, streaming=restart))
                deadline = time.monotonic() + timeout_s
        wait.done()
        return [results[a] for a in answers]

    def _raised(self, method: str, failed: Mapping[int, RayError], pending: Sequence[int]) -> TrainerError:
        """Of ranks that failed while others have not answered. A collective that timed out, or lost a rank, fails on
        those who waited, not on who kept them waiting."""
        died = {rank for rank, error in failed.items() if isinstance(error, RayActorError)}
        positions = self._positions(pending, died)
        first, why = min(died, default=next(iter(failed))), next(iter(failed.values()))
        words = self._explain(first, method, failed.get(first, RayActorError()))
        silent = tuple(self._silent({rank: at for rank, at in positions.items() if rank not in died}))
        raised = (RankDiedError if died else TrainerError)("; ".join([words, *silent]))
        raised.silent, raised.__cause__ = silent, failed.get(first, why)
        return raised

    def _awaited(self, ranks: Sequence[int]) -> str:
        """Ranks that have not answered, which of them answers nothing at all, and which servers these wait for."""
        silent = self._silent(self._positions(ranks))
        servers = [] if silent or 0 not in ranks else self._servers_awaited()
        words = "".join(f" ({s})" for s in (*silent, *servers))
        return f"trainer rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}{words}"

    def _servers_awaited(self) -> list[str]:
        """What rank 0 has asked of servers that have not answered yet."""
        done, _ = ray.wait(self._ask(self.ranks[:1], "servers_awaited"), timeout=ANSWER_S)
        with contextlib.suppress(RayActorError):  # it died meanwhile, which who waits for its answer hears
            return ray.get(done[0]) if done else []
        return []

    def _positions(self, ranks: Sequence[int], died: set[int] | None = None) -> dict[int, int | None]:
        """rank -> its position in the stream of weights, None for one that does not answer at all. died: gets those of
        them that will not."""
        asked = dict(zip(self._ask([self.ranks[r] for r in ranks], "position"), ranks, strict=True))
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        positions: dict[int, int | None] = dict.fromkeys(ranks)
        died = set() if died is None else died
        for answer in done:
            try:
                positions[asked[answer]] = ray.get(answer)
            except RayActorError:
                died.add(asked[answer])
        return positions

    def _stalled(self, positions: dict[int, int | None], method: str, timeout_s: float, *, streaming: bool) -> str:
        late = f"trainer ranks {list(positions)} did not finish {method} in {timeout_s:g} s"
        silent = self._silent(positions)
        if streaming and not silent:
            at, rank = min((p, r) for r, p in positions.items() if p is not None)
            return f"{late}; rank {rank} is furthest behind, at bucket {at} (log: {self.log_path(rank)})"
        return "; ".join([late, *silent])

    def _silent(self, positions: dict[int, int | None]) -> list[str]:
        return [
            f"rank {rank} does not answer, it hangs or was stopped (log: {self.log_path(rank)})"
            for rank, position in positions.items()
            if position is None
        ]

    def _explain(self, rank: int, method: str, error: Exception) -> str:
        log = self.log_path(rank)
        if isinstance(error, RayActorError):
            return f"{what_died()}trainer rank {rank} died during {method}; its log: {log}"
        cause = error.cause if isinstance(error, RayTaskError) else error
        return f"trainer rank {rank} failed during {method}: {type(cause).__name__}: {cause} (log: {log})"

    def stop(self) -> None:
        """End every rank. Never raises for a rank that is already gone."""
        for rank in self.ranks:
            ray.kill(rank)  # pyright: ignore[reportArgumentType]  (its stub knows no actor proxies)


def rank_log(directory: Path, rank: int) -> Path:
    """The log of a rank, in a directory of logs."""
    return directory.resolve() / f"trainer_rank{rank}.log"
