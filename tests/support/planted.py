"""Faults in the engines of a run whose processes are forked for tests: a trainer rank, or a server, that sleeps; a rank
whose gradient spikes, or one of whose experts has a NaN.

They are put around the engines' own methods from outside, while a run goes on: a file of the folder that `FOLDER`
names is a fault, until it is gone. Its name says where, "trainer rank 1 update" or "server 0"; its text how long that
one sleeps before each call: so many times as long as its last calls took it themselves (in the transfer and between
phases, as its last updates did), or `HELD`, as long as the file is there. No fault depends on how fast the machine is.
`SPIKE` makes the gradient of an update a million times as long; after an update with `NAN` one number of one expert is
not one.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = "SAMEROUTE_PLANTED"
HELD, SPIKE, NAN = "held", "spike", "nan"
_LAST = 8  # calls
_updates = deque[float](maxlen=_LAST)


@contextmanager
def fault(folder: Path, where: str, how: float | str) -> Iterator[None]:
    """While it lasts, `where` sleeps."""
    file = folder / where
    file.with_suffix(".new").write_text(str(how))
    file.with_suffix(".new").rename(file)
    try:
        yield
    finally:
        file.unlink()


def in_rank() -> None:
    """In a process that is to be a trainer rank, where a test may plant something."""
    if FOLDER in os.environ:
        from megatron_ext.trainer import Trainer
        from pipeline.trainer.phases import waited
        from pipeline.trainer.rank import TrainerRank

        _around(Trainer, "logprobs", functools.partial(_rank, "logprobs"), waited)
        _around(Trainer, "update", functools.partial(_rank, "update"), waited, _updates)
        for kind, method, phase in ((Trainer, "share", "sync"), (TrainerRank, "update_policy", "between")):
            _before(kind, method, functools.partial(_rank, phase))


def in_server() -> None:
    """In a process that is to be a server: its scheduler is forked from it."""
    if FOLDER in os.environ:
        from sglang.srt.managers.scheduler import Scheduler

        _around(Scheduler, "run_batch", _server, lambda: 0.0)


def _rank(phase: str) -> str:
    from torch.distributed import get_rank

    return f"trainer rank {get_rank()} {phase}"


def _server() -> str:
    """By its log, which its standard output goes to."""
    number = re.search(r"sglang_(\d+)\.log", os.readlink("/proc/self/fd/1"))
    return f"server {number[1] if number else 0}"


def _before(kind: type, name: str, where: Callable[[], str]) -> None:
    """A method of which only the beginning can be late."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        _sleep(where(), _how(where()), median(_updates) if _updates else 0.0)
        return method(*args, **kwargs)

    setattr(kind, name, call)


def _around(
    kind: type,
    name: str,
    where: Callable[[], str],
    waited: Callable[[], float],
    last: deque[float] | None = None,
) -> None:
    """last: gets the seconds of each call."""
    method, last = getattr(kind, name), deque[float](maxlen=_LAST) if last is None else last

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        how = _how(where())
        _sleep(where(), how, median(last) if last else 0.0)
        if how == SPIKE:
            trainer, samples, loss, *more = args
            args = trainer, samples, lambda batch: _larger(loss(batch)), *more
        began, before = time.perf_counter(), waited()
        result = method(*args, **kwargs)
        last.append(time.perf_counter() - began - (waited() - before))
        if how == NAN:
            _no_number(args[0])
        return result

    setattr(kind, name, call)


def _how(where: str) -> str | None:
    """What is planted there now."""
    try:
        return Path(os.environ[FOLDER], where).read_text()
    except FileNotFoundError:
        return None


def _sleep(where: str, how: str | None, usual_s: float) -> None:
    if how == HELD:
        hold(Path(os.environ[FOLDER], where))
    elif how not in (None, SPIKE, NAN):
        time.sleep(float(how) * usual_s)


def _larger(loss: tuple[Any, Any]) -> tuple[Any, Any]:
    return 1e6 * loss[0], loss[1]


def _no_number(trainer: Any) -> None:
    """In the first matrix of the second layer's last expert that this rank has."""
    import torch

    named = dict(trainer.policy.chunks[0].named_parameters())
    name = max(n for n in named if ".layers.1.mlp.experts.linear_fc1.weight" in n)
    with torch.no_grad():
        named[name].view(-1)[0] = torch.nan


def hold(file: Path) -> None:
    """As long as it is there."""
    while file.exists():
        time.sleep(0.05)
