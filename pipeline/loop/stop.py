"""SIGTERM and SIGUSR1, which Slurm sends before a time limit and at pre-emption: save, then end.

The first asks: the step in progress is finished, a checkpoint saved. The second, or the end of the grace period, ends
the run at once. So does the first while there is nothing that could be saved: before the first step, or without
checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Self

from pipeline.config.checkpoint import CheckpointConfig
from pipeline.deaf import ASKING
from pipeline.errors import TO_BE_RESUMED, SamerouteError


class Stopped(SamerouteError):
    """A signal ended the run, and it can be resumed; the message says from where."""

    exit_code = TO_BE_RESUMED


class StopRequest:
    """Whether a signal has asked for the end. signal_name: of the first that came."""

    def __init__(self, grace_s: float | None):
        """grace_s: seconds from the first signal to the end at most; None: signals end the run at once."""
        self.grace_s = grace_s
        self.signal_name: str | None = None
        self.at_once = False
        self._armed = False
        self._timer: threading.Timer | None = None

    @classmethod
    def of_run(cls, config: CheckpointConfig) -> Self:
        """Of a run with these checkpoints; it listens. In the main thread."""
        request = cls(config.grace_s if config.every_steps is not None else None)
        request.listen()
        return request

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def listen(self) -> None:
        """From now on both signals come here. In the main thread."""
        for number in ASKING:
            signal.signal(number, self._receive)

    def arm(self) -> None:
        """From now on there is something to save: a first signal only asks."""
        self._armed = self.grace_s is not None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """The run. After it a signal ends at once again, and no grace period runs on."""
        try:
            yield
        finally:
            self._armed = False
            if self._timer is not None:
                self._timer.cancel()

    def _receive(self, number: int, frame: object) -> None:
        first = not self.requested
        self.signal_name = self.signal_name or signal.Signals(number).name
        if not (first and self._armed):
            self.at_once = True
            raise KeyboardInterrupt
        assert self.grace_s is not None
        text = f"{self.signal_name}: finishing the step, then saving a checkpoint, in {self.grace_s:g} s at most\n"
        os.write(2, text.encode())  # a print may be what was interrupted
        self._timer = threading.Timer(self.grace_s, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()
