"""Whose turn it is on the GPUs, where trainer and servers share them (`cluster.colocated`).

    training   the trainer has all of its memory; of the servers nothing is there but their processes
    sending    both have their weights' memory, and nothing else: a transfer
    sampling   the servers have all of theirs; of the trainer nothing is there but its processes

Nobody hands the turn on: whoever needs it takes it. A call to the trainer that computes begins with `training`, the
first request to the servers with `sampling`, a transfer is inside of `sending`. So a checkpoint, an evaluation, a
comparison of the engines or a model that is written finds what it needs, whenever it comes; what that costs is counted.

A turn that ends drops the servers' weights. They come back with a transfer, and where `sampling` follows on `training`
without one, they are sent again under the version that they had.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

TrainerPart = Literal["weights", "optimizer"]
"""What a trainer moves to the host and back. weights: of all its models; optimizer: Adam's states, and the gradients,
which are not kept."""

ServerPart = Literal["weights", "cache"]
"""What a server gives away and takes back. cache: of keys and values, and what CUDA graphs hold."""


class TrainerMemory(Protocol):
    """What of a TrainerGroup is needed here."""

    def release_memory(self, parts: Sequence[TrainerPart]) -> None: ...
    def resume_memory(self, parts: Sequence[TrainerPart]) -> None: ...


class ServerMemory(Protocol):
    """What of a Fleet is needed here."""

    def release_memory(self) -> None: ...
    def resume_memory(self, part: ServerPart) -> None: ...
    def send_again(self) -> None: ...


class Turns(Protocol):
    """Who asks says what for; see the module."""

    def training(self) -> None:
        """Returns when the trainer may compute."""
        ...

    def sampling(self) -> None:
        """Returns when the servers may sample, under the weights that were sent last."""
        ...

    def sending(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the trainer's weights can go to the servers; afterwards these may sample."""
        ...

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the trainer's weights are there, whoever's turn it is."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the turns since the last call."""
        ...


class Apart:
    """Each engine has memory of its own: nobody waits for a turn."""

    def training(self) -> None:
        """At any time."""

    def sampling(self) -> None:
        """At any time."""

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        yield

    reading = sending

    def metrics(self) -> dict[str, float]:
        return {}


class Colocated:
    """By turns; it begins with the servers', who have just started. From any thread."""

    def __init__(self, trainer: TrainerMemory, servers: ServerMemory):
        self._trainer, self._servers = trainer, servers
        self.turn: Literal["training", "sampling"] = "sampling"
        self._lock = threading.RLock()
        self._count, self._seconds = 0, 0.0

    def training(self) -> None:
        with self._lock:
            if self.turn == "training":
                return
            with self._moving():
                self._servers.release_memory()
                self._trainer.resume_memory(("weights", "optimizer"))
            self.turn = "training"
            self._count += 1

    def sampling(self) -> None:
        with self._lock:
            if self.turn == "training":
                self._servers.send_again()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        with self._lock:
            if self.turn == "sampling":  # to a server that came back, beside the others' caches
                with self.reading():
                    yield
                return
            with self._moving():
                self._trainer.release_memory(("optimizer",))
                self._servers.resume_memory("weights")
            yield
            with self._moving():
                self._trainer.release_memory(("weights",))
                self._servers.resume_memory("cache")
            self.turn = "sampling"
            self._count += 1

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._lock:
            if self.turn == "training":
                yield
                return
            with self._moving():
                self._trainer.resume_memory(("weights",))
            yield
            with self._moving():
                self._trainer.release_memory(("weights",))

    def metrics(self) -> dict[str, float]:
        with self._lock:
            found = {"turns/count": float(self._count), "time/turns_s": self._seconds}
            self._count, self._seconds = 0, 0.0
            return found

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began
