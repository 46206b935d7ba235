"""The files a run leaves.

config.yaml          the resolved configuration
metrics.jsonl        one JSON object a step, of numbers
records.jsonl        one JSON object a step, of what is no single number: see step_record
tensorboard/         the same as events
logs/                one log a process of both engines
rollouts/            step_000012.txt and .json: a few sampled rollouts, for people and for the report
dumps/               step_000012.safetensors: what a step trained on, where debug.dump_rollouts asks for it
hf/                  the trained model, where the run wrote one
summary.png          reward, mismatch, lengths
diagnose.json        how far the engines were apart before the first step; diagnose.html too where it was too far
facts.json           hosts, GPUs, versions, commit, and where each trainer rank is: see facts
alerts.jsonl         one JSON object an alert that fired or was resolved, where one did
wandb/               what observe.wandb keeps here
report.html          what `sameroute report` makes of all this
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import yaml

from pipeline.observe.rollout_text import pick, rollout_text
from pipeline.observe.step_record import StepArrays, shown_rollouts, step_record
from pipeline.types import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config import Config
    from pipeline.objectives import Objective
    from pipeline.observe.events import EventWriter

_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "records.jsonl",
    "summary.png",
    "report.html",
    "diagnose.json",
    "diagnose.html",
    "facts.json",
    "alerts.jsonl",
)
_DIRECTORIES = ("tensorboard", "logs", "rollouts", "dumps", "model", "hf", "wandb")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used; the message says what to write instead."""


class RunDirectory:
    """One run's directory, open for writing. A context: files are closed on leaving.

    path, logs, metrics_path: where things are.
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any], *, overwrite: bool = False, rollouts_shown: int = 4
    ):
        """Make the directory and write config.yaml.

        config: the resolved configuration as plain values. overwrite: remove the run that is there.
        Raises RunDirectoryError where the path holds another run, or anything that no run has written.
        """
        self.path = Path(path)
        self.rollouts_shown = rollouts_shown
        _clear(self.path, overwrite)
        self.logs, self.metrics_path = self.path / "logs", self.path / "metrics.jsonl"
        for directory in (self.logs, self.path / "rollouts", self.path / "tensorboard"):
            directory.mkdir(parents=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self._metrics = self.metrics_path.open("x", encoding="utf-8")
        self._steps = (self.path / "records.jsonl").open("x", encoding="utf-8")
        self._events: EventWriter | None = None
        self._records = 0

    @classmethod
    def create(cls, config: Config) -> Self:
        """The directory that a run's configuration asks for."""
        return cls(
            config.run.directory,
            config.model_dump(mode="json"),
            overwrite=config.run.overwrite,
            rollouts_shown=config.run.rollouts_shown,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write out and close metrics and events. A second call does nothing."""
        self._metrics.close()
        self._steps.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def record(self, metrics: Mapping[str, float]) -> None:
        """One step's metrics, "step" among them, to metrics.jsonl (flushed) and TensorBoard.

        Raises ValueError, naming the key, for a value that is no finite number; nothing is written then.
        """
        if "step" not in metrics:
            raise ValueError('the metrics of a step need the key "step"')
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"step {metrics['step']}: the metric {key!r} is {value}")
        # int() and float() turn numpy's scalars into what JSON knows.
        row = {key: int(v) if key == "step" else float(v) for key, v in metrics.items()}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._events is None:
            from pipeline.observe.events import EventWriter

            self._events = EventWriter(self.path / "tensorboard")
        self._events.record(int(metrics["step"]), {key: v for key, v in row.items() if key != "step"})
        self._records += 1

    def write_rollouts(self, step: int, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> Path | None:
        """Write `rollouts_shown` rollouts of a step to rollouts/step_NNNNNN.txt; None where none are shown."""
        if not self.rollouts_shown:
            return None
        texts = [rollout_text(group, position, tokenizer) for group, position in pick(groups, self.rollouts_shown)]
        file = self.path / "rollouts" / f"step_{step:06d}.txt"
        file.write_text("\n".join(texts), encoding="utf-8")
        return file

    def write_arrays(
        self,
        step: int,
        groups: Sequence[Group],
        arrays: StepArrays,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """A step's line of records.jsonl (flushed), and what `write_rollouts` shows as rollouts/step_NNNNNN.json."""
        self._steps.write(json.dumps(step_record(step, groups, arrays, objective), allow_nan=False) + "\n")
        self._steps.flush()
        if self.rollouts_shown:
            shown = shown_rollouts(groups, arrays, tokenizer, self.rollouts_shown)
            file = self.path / "rollouts" / f"step_{step:06d}.json"
            partial = file.with_suffix(".partial")  # the report may read while the run writes
            partial.write_text(json.dumps(shown, allow_nan=False), encoding="utf-8")
            partial.replace(file)

    def hf_directory(self, model_path: str | Path) -> Path:
        """hf/ with every file of a Hugging Face directory but its weights: config, tokenizer, generation settings."""
        target = self.path / "hf"
        target.mkdir(exist_ok=True)
        for file in Path(model_path).iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, target / file.name)
        return target

    def finish(self) -> None:
        """The run is over: close the files and draw summary.png (none for a run without a step)."""
        self.close()
        if self._records:
            from pipeline.observe.summary import write_summary

            write_summary(self.metrics_path, self.path / "summary.png")


def _clear(path: Path, overwrite: bool) -> None:
    """Remove an earlier run where that is allowed; only names that a run writes are ever removed."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file; set run.directory to another path")
    present = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if not present:
        return
    foreign = [name for name in present if name not in (*_FILES, *_DIRECTORIES)]
    if "config.yaml" not in present or foreign:
        what = ", ".join((foreign or present)[:3])
        raise RunDirectoryError(f"{path} holds what no run has written ({what}); set run.directory to another path")
    if not overwrite:
        raise RunDirectoryError(
            f"{path} holds a run already; set run.directory to another path, or run.overwrite=true to delete that run"
        )
    for name in present:
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()
