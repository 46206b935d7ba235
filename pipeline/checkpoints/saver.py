"""Checkpoints while the run goes on: begun after a step, complete as soon as their files are written.

A thread looks whether the ranks have written, has the whole described and renames it. It waits for no step: a
checkpoint that is whole on the disk counts, whatever the ranks do or fail to do meanwhile.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Progress
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.disk.disk_errors import free_space
from pipeline.trainer.waits import TrainerError

_FIRST_POLL_S, _POLL_S = 0.005, 0.5  # between two looks at whether the ranks have written, twice as long each time
_STOPPED_S = 2.0  # from giving up to the end of the thread
_END_S = 60.0  # that a run which fails leaves to a checkpoint in progress


class SavingTrainers(Protocol):
    """What of a TrainerGroup saving asks for."""

    def begin_save(self, directory: Path) -> None: ...
    def save_written(self) -> bool: ...
    def finish_save(self) -> None: ...


class Saver:
    """Saves while the run goes on, one checkpoint at a time. One that fails is an error where it is next asked for.

    A context: on leaving, a checkpoint in progress is completed, or removed where that cannot be.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        trainers: SavingTrainers,
        companions: Callable[[Path], object],
        said: Callable[[str], None] = lambda _: None,
    ):
        """companions: writes into a directory what of the model is no weights. said: is told of a complete one, from
        the thread."""
        self.store, self.config, self.trainers = store, config, trainers
        self.companions, self.said = companions, said
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._error: BaseException | None = None

    def save(self, progress: Progress, write: Callable[[Path], object] = lambda _: None) -> None:
        """Begin; waits for the one before. write: what else belongs into its directory, from the thread. Raises
        CheckpointError, as all of these do."""
        self.wait()
        partial = None
        try:
            partial = self.store.begin(progress.name)
            self.trainers.begin_save(partial)
        except (OSError, TrainerError) as error:
            raise self._failed(progress, partial, error) from error
        self._partial = partial
        self._given_up.clear()
        self._thread = threading.Thread(
            target=self._complete, args=(partial, progress, write), name="sameroute checkpoint", daemon=True
        )
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Raise what has gone wrong meanwhile."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that was begun is complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            # The run says why it ends; the trainer may live, and then so may what it has begun to save.
            self._thread.join(_END_S if isinstance(error, Exception) else 0)  # a signal does not wait
            self._given_up.set()
            self._thread.join(_STOPPED_S)
            if self._thread.is_alive():  # it waits for a rank that hangs, and will end with that
                shutil.rmtree(self._partial, ignore_errors=True)
            if isinstance(self._error, CheckpointError):
                self.said(str(self._error))

    def _complete(self, partial: Path, progress: Progress, write: Callable[[Path], object]) -> None:
        pause_s = _FIRST_POLL_S
        try:
            write(partial)
            while not self.trainers.save_written():
                pause_s = min(2 * pause_s, _POLL_S)
                if self._given_up.wait(pause_s):
                    shutil.rmtree(partial, ignore_errors=True)
                    return
            self.trainers.finish_save()
            self.companions(partial / "hf")
            target = self.store.commit(partial, progress)
        except (OSError, TrainerError) as error:
            self._error = self._failed(progress, partial, error)
            self._error.__cause__ = error
        except BaseException as error:  # a mistake of ours: the run's thread raises it
            shutil.rmtree(partial, ignore_errors=True)
            self._error = error
        else:
            self.said(f"checkpoint {target}")

    def _failed(self, progress: Progress, partial: Path | None, error: Exception) -> CheckpointError:
        space = free_space(self.store.directory)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        last = self.store.latest()
        which = f"the last complete one is {last}" if last else "there is no earlier one"
        return CheckpointError(f"checkpoint {progress.name} was not written: {error} ({space}); {which}")
