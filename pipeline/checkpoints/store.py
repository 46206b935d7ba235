"""The checkpoints of a run, RUN/checkpoints/step_12: each is there whole or not at all.

One is written into `.step_12.partial`, brought to the disk and renamed; only then may the oldest go. So whatever
happens to the process at whatever moment, a directory without a leading dot is complete, and one with it is remains.

`best` is a link to the one that an evaluation found best; that one stays, however old.

What is in one: the trainer's state (`megatron_ext.checkpoint.training`), `hf/` with the files of the model that are no
weights, and `progress.json`, where the run stood.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.names import CHECKSUMS
from pipeline.config.secrets import shown
from pipeline.errors import SamerouteError

if TYPE_CHECKING:
    from pipeline.config import Config

FORMAT = 1
PROGRESS = "progress.json"
BEST = "best"
_NAME = re.compile(r"(step|supervised)_(\d+)")


class CheckpointError(SamerouteError):
    """A checkpoint was not written, or is not one; the message says which, and which is the last."""


@dataclass(frozen=True)
class Progress:
    """Where a run stood. JSON holds it.

    step:       RL steps that are done.
    supervised: supervised steps that are done.
    version:    of the weights that the servers held.
    cursor:     of the prompts (PromptSource.state).
    config:     that made it, as plain values.
    evaluations: what was evaluated, and which was best (loop.evaluations.Evaluations.state).
    """

    step: int
    supervised: int
    version: int
    cursor: dict[str, Any]
    config: dict[str, Any]
    evaluations: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"step_{self.step}" if self.step else f"supervised_{self.supervised}"

    @property
    def is_best(self) -> bool:
        """Whether no evaluation before was better than the one after this step."""
        best = self.evaluations.get("best") or {}
        return bool(self.step) and best.get("step") == self.step


def read_progress(checkpoint: Path) -> Progress:
    """Raises CheckpointError for a directory that is no checkpoint of a run, or lacks a file, or has a cut one."""
    advice = f"; remove {checkpoint} to resume from an older one"
    try:
        tree = json.loads((checkpoint / PROGRESS).read_text())
        if tree.pop("format") != FORMAT:
            raise CheckpointError(f"{checkpoint} is of another version of sameroute")
        progress = Progress(**tree)
        for name, (size, _) in json.loads((checkpoint / CHECKSUMS).read_text()).items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"has {file.stat().st_size}" if file.is_file() else "is missing"
                raise CheckpointError(f"{file} {found}, of {size} bytes{advice}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}{advice}") from error
    return progress


class CheckpointStore:
    """The directory RUN/checkpoints."""

    def __init__(self, directory: Path, keep_last: int = 1):
        self.directory, self.keep_last = directory, keep_last

    def complete(self) -> list[Path]:
        """The oldest first."""
        names = [p.name for p in self.directory.iterdir()] if self.directory.is_dir() else []
        found = [(m[1] == "step", int(m[2]), name) for name in names if (m := _NAME.fullmatch(name))]
        return [self.directory / name for *_, name in sorted(found)]

    def latest(self) -> Path | None:
        """The newest complete one."""
        return next(reversed(self.complete()), None)

    @property
    def best(self) -> Path | None:
        """The one that an evaluation found best, RUN/checkpoints/best."""
        link = self.directory / BEST
        return link.resolve() if link.exists() else None

    def clean(self) -> list[str]:
        """Remove what interrupted saves and removals have left; returns the names."""
        left = sorted(p for p in self.directory.iterdir() if p.name.startswith(".")) if self.directory.is_dir() else []
        for path in left:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        return [path.name for path in left]

    @contextlib.contextmanager
    def in_use(self, is_ours: Callable[[], bool]) -> Iterator[None]:
        """A run saves inside. Where it ends with an error, what was being written is removed behind whoever wrote.

        is_ours: whether the directory is still the run's; what another one writes there is not touched.
        """
        try:
            yield
        except BaseException:
            if is_ours():
                with contextlib.suppress(OSError):  # the disk may be why it ends
                    self.clean()
            raise

    def begin(self, name: str) -> Path:
        """An empty directory for a checkpoint that is to be called so."""
        partial = self.directory / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, partial: Path, progress: Progress) -> Path:
        """Everything else is in it: make it complete, in one act, then remove the oldest."""
        tree = {"format": FORMAT} | dataclasses.asdict(progress)
        (partial / PROGRESS).write_text(json.dumps(tree, indent=1) + "\n")
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
        target = self.directory / progress.name
        partial.rename(target)
        _to_disk(self.directory)
        if progress.is_best:
            self.call_best(target)
        for old in self.complete()[: -self.keep_last]:
            if old.resolve() == self.best:
                continue
            removed = old.with_name(f".{old.name}.removed")  # never half of one under its name
            old.rename(removed)
            shutil.rmtree(removed)
        return target

    def call_best(self, checkpoint: Path) -> None:
        """Link to it as the best one, in one act."""
        link = self.directory / f".{BEST}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.rename(self.directory / BEST)
        _to_disk(self.directory)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def progress_of(
    config: Config,
    *,
    step: int,
    supervised: int,
    version: int,
    cursor: dict[str, Any],
    evaluations: dict[str, Any] | None = None,
) -> Progress:
    """Where a run with this configuration stands."""
    return Progress(step, supervised, version, cursor, shown(config.model_dump(mode="json")), evaluations or {})
