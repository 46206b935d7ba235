"""The one that everybody waits for, from the stacks of all.

a process that was stopped, or is gone                      it is named
ranks of which some wait in a collective, and others do not the others are named, with what they do
ranks that wait in different collectives                    both are named
all ranks in the same collective                            the network between them
idle ranks, and a server with requests in flight            the server, and where its scheduler is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cluster.stacks import Frame, ProcessStacks

_RANK_FILE, _SCHEDULER = "pipeline/trainer/rank.py", "sglang/srt/managers/scheduler"
_COLLECTIVES = ("torch/distributed/", "megatron_ext/collective_clock.py")
_WRAPPERS = ("wrapper", "timed_wait", "wait")
_WAITING_FILES = ("concurrent/futures/thread.py", "threading.py", "asyncio/", "selectors.py", "zmq/", "queue.py")


@dataclass(frozen=True)
class Seen:
    """A rank or a server. about: for the file, beside its name. in_flight: requests that a server has."""

    who: str
    processes: tuple[ProcessStacks, ...]
    about: str = ""
    in_flight: int = 0

    @property
    def is_rank(self) -> bool:
        return self.who.startswith("trainer")


def sentence(seen: Sequence[Seen]) -> str:
    """Who is waited for, and what it does."""
    for one in seen:
        for process in one.processes:
            if process.state in ("stopped", "dead", "gone"):
                where = _where(process)
                how = "was stopped (SIGSTOP)" if process.state == "stopped" else f"is {process.state}"
                return f"everybody waits for {one.who}, whose process {process.pid} {how}{where}"
    ranks = {one.who: _working(one.processes[0]) for one in seen if one.is_rank}
    busy = {who: frames for who, frames in ranks.items() if frames}
    if busy:
        return _of_ranks(busy, {one.who: one.processes[0].problem for one in seen if one.is_rank})
    return _of_servers([one for one in seen if not one.is_rank])


def _of_ranks(busy: dict[str, tuple[Frame, ...]], problems: dict[str, str]) -> str:
    waiting = {who: _collective(frames) for who, frames in busy.items()}
    late = _odd([who for who, frame in waiting.items() if frame is None], busy)
    kinds: dict[str, list[str]] = {}
    for who, frame in waiting.items():
        if frame is not None:
            kinds.setdefault(frame.name, []).append(who)
    unread = [who for who, why in problems.items() if why]
    if late:
        names = ", ".join(f"{who}, which is in {busy[who][0]}" for who in late[:4])
        others = sum(map(len, kinds.values()))
        beside = f", while {others} other rank{'s wait' if others > 1 else ' waits'} in a collective" if others else ""
        return f"everybody waits for {names}{beside}"
    if unread:
        return f"the stacks of {', '.join(unread)} cannot be read; the other ranks wait in a collective"
    absent = [who for who in problems if who not in busy]
    if absent:
        return f"{', '.join(waiting)} wait in {next(iter(kinds))}, which {', '.join(absent)} does not take part in"
    if len(kinds) > 1:
        return "ranks wait in different collectives: " + "; ".join(
            f"{', '.join(whos[:4])} in {kind}" for kind, whos in kinds.items()
        )
    kind = next(iter(kinds))
    return f"all ranks wait in {kind}: the network between them, or a collective that is very large"


def _odd(late: list[str], busy: dict[str, tuple[Frame, ...]]) -> list[str]:
    """Of ranks that wait in no collective, as all do whose collectives are on a GPU, the few that are where the others
    are not."""
    places: dict[Frame, list[str]] = {}
    for who in late:
        places.setdefault(busy[who][0], []).append(who)
    fewest = sorted(places.values(), key=len)
    return fewest[0] if len(late) == len(busy) and len(fewest) == 2 and len(fewest[0]) < len(fewest[1]) else late


def _of_servers(servers: Sequence[Seen]) -> str:
    asked = sorted((one for one in servers if one.in_flight), key=lambda one: -one.in_flight)
    if not asked:
        return "no rank works and no server has requests: the controller itself, whose stack is the last of the file"
    named = []
    for one in asked[:4]:
        frames = next((f for process in one.processes if (f := _scheduler(process))), ())
        doing = next((f for f in frames if not any(part in f.file for part in _WAITING_FILES)), None)
        where = f"its scheduler is in {doing}" if doing is not None else "its scheduler was not found"
        named.append(f"{one.who}, which has {one.in_flight} requests in flight; {where}")
    return f"the run waits for {', and '.join(named)}"


def _working(process: ProcessStacks) -> tuple[Frame, ...]:
    """The thread of a rank that a call runs in; none where it has nothing to do."""
    for thread in process.threads:
        calls = [f for f in thread.frames if _RANK_FILE in f.file and f.name not in ("position", "servers_awaited")]
        if calls:
            return thread.frames
    return ()


def _scheduler(process: ProcessStacks) -> tuple[Frame, ...]:
    """The thread of SGLang's event loop."""
    for thread in process.threads:
        if any(_SCHEDULER in frame.file and "event_loop" in frame.function for frame in thread.frames):
            return thread.frames
    return ()


def _collective(frames: Sequence[Frame]) -> Frame | None:
    """What a thread waits in: the outermost of the innermost frames that are torch's own."""
    if not any(part in frames[0].file for part in _COLLECTIVES):
        return None
    inside = None
    for frame in frames:
        if not any(part in frame.file for part in _COLLECTIVES):
            break
        if frame.name not in _WRAPPERS:
            inside = frame
    return inside or frames[0]


def _where(process: ProcessStacks) -> str:
    frames = _working(process) or _scheduler(process)
    return f" in {frames[0]}" if frames else ""
