"""Checkpoints while the run goes on: begun after a step, completed when their files are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Progress
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.trainer.group import TrainerError, TrainerGroup


class Saver:
    """Saves while the run goes on, one checkpoint at a time. One that fails is an error where it is next asked for."""

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        trainers: TrainerGroup,
        companions: Callable[[Path], object],
        said: Callable[[str], None] = lambda _: None,
    ):
        """companions: writes into a directory what of the model is no weights. said: is told of a complete one."""
        self.store, self.config, self.trainers = store, config, trainers
        self.companions, self.said = companions, said
        self._pending: tuple[Path, Progress] | None = None

    def save(self, progress: Progress) -> None:
        """Begin; waits for the one before. Raises CheckpointError, as all of these do."""
        self.wait()
        try:
            partial = self.store.begin(progress.name)
            self._pending = partial, progress
            self.trainers.begin_save(partial)
        except (OSError, TrainerError) as error:
            raise self._failed(error) from error
        if not self.config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Complete what has been written meanwhile."""
        self._complete(wait=False)

    def wait(self) -> None:
        """Until the checkpoint that was begun is complete."""
        self._complete(wait=True)

    def _complete(self, *, wait: bool) -> None:
        if self._pending is None:
            return
        partial, progress = self._pending
        try:
            if not self.trainers.save_written(wait=wait):
                return
            self.trainers.finish_save()
            self.companions(partial / "hf")
            target = self.store.commit(partial, progress)
        except (OSError, TrainerError) as error:
            raise self._failed(error) from error
        self._pending = None
        self.said(f"checkpoint {target}")

    def _failed(self, error: Exception) -> CheckpointError:
        name = "?"
        if self._pending is not None:
            partial, progress = self._pending
            name = progress.name
            shutil.rmtree(partial, ignore_errors=True)
            self._pending = None
        last = self.store.latest()
        which = f"the last complete one is {last}" if last else "there is no earlier one"
        return CheckpointError(f"checkpoint {name} was not written: {error}; {which}")
