"""The files a run leaves.

config.yaml          the resolved configuration, *** in place of what may be a secret
secrets.yaml         that, over config.yaml as its base, readable by its owner only; where there is any
metrics.jsonl        one JSON object a step, of numbers
records.jsonl        one JSON object a step, of what is no single number: see step_record
regraded.parquet     what `sameroute regrade` found
episodes/             every answer that was graded, as Parquet: see episodes
evaluations.jsonl    one JSON object an evaluation, or why one was left out
evaluations/         NAME/step_000012.jsonl: its questions and answers
tensorboard/         the same as events
logs/                one log a process of both engines
rollouts/            step_000012.txt and .json: a few sampled rollouts, for people and for the report
dumps/               step_000012.safetensors: what a step trained on, where debug.dump_rollouts asks for it
stalls/              stall_001.txt: where every process was when the run stood still
profiles/            step_000012/: traces of the steps that debug.profile names
checkpoints/         step_12: all that resuming after that step needs, where checkpoint.every_steps asks for it
dropped/             what a resumed run had written after its checkpoint: rows of both files, rollouts
hf/                  the trained model, where the run wrote one
peft/                its adapters alone, where it trained adapters, as the PEFT library reads them
best_hf/             the model that an evaluation found best, where checkpoint.best.export pushes it to a hub
summary.png          reward, mismatch, lengths
diagnose.json        how far the engines were apart before the first step; diagnose.html too where it was too far
facts.json           hosts, GPUs, versions, commit, and where each trainer rank is: see facts
alerts.jsonl         one JSON object an alert that fired or was resolved, where one did
wandb/               what observe.wandb keeps here
report.html          what `sameroute report` makes of all this
failed/              the same files of the last start that came to no step

While a run starts over an earlier one, that one is in .before; see `pipeline.disk.earlier`. .lock says whose the
directory is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megatron_ext.hf.companions import Dtype, write_companions
from pipeline.config.secrets import hidden, shown
from pipeline.disk import earlier
from pipeline.disk.claim import Claim, cannot_write
from pipeline.disk.disk_errors import DiskError, RunDirectoryError, of_the_disk, writing
from pipeline.disk.rows import Rows
from pipeline.errors import SamerouteError
from pipeline.observe.episodes import FOLDER as EPISODES
from pipeline.observe.episodes import EpisodeTable, drop_episodes
from pipeline.observe.rollout_text import pick, rollout_text
from pipeline.observe.step_record import shown_rollouts, step_record
from pipeline.say import to_stderr
from pipeline.step import StepResult
from pipeline.text.yaml_text import dump

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config import Config
    from pipeline.objectives import Objective
    from pipeline.observe.events import EventWriter

_FILES = (
    "config.yaml",
    "secrets.yaml",
    "metrics.jsonl",
    "records.jsonl",
    "evaluations.jsonl",
    "summary.png",
    "report.html",
    "diagnose.json",
    "diagnose.html",
    "facts.json",
    "alerts.jsonl",
    "regraded.parquet",
    "metrics.partial",  # left where a process was killed while it wrote
    "records.partial",
    "evaluations.partial",
    "facts.partial",
    "config.yaml.partial",
)
_DIRECTORIES = (
    "tensorboard",
    "logs",
    "rollouts",
    "evaluations",
    "episodes",
    "servers",
    "dumps",
    "stalls",
    "profiles",
    "model",
    "hf",
    "best_hf",
    "peft",
    "wandb",
    "checkpoints",
    "dropped",
)


class RunDirectory:
    """One run's directory, open for writing. A context: files are closed on leaving, and a run that came to no step
    leaves an earlier one as it was.

    path, logs, metrics_path: where things are.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        rollouts_shown: int = 4,
        passing_reward: float = 1.0,
        components: Sequence[str] = (),
        episode_answers: bool = True,
        resume_after: int | None = None,
        claim: Claim | None = None,
        say: Callable[[str], None] = to_stderr,
    ):
        """Make the directory and write config.yaml.

        config: the resolved configuration as plain values. overwrite: the run that is there may go; it is moved aside
        now, and removed when the new one has begun (`begun`).
        components: names of the reward's. episode_answers: episodes/ has what was asked and answered.
        resume_after: go on with the run that is there, after this step; what it wrote of later ones goes to dropped/.
        claim: of the path; its lock is looked at with every step. say: is told what became of an earlier run.
        Raises RunDirectoryError where the path holds another run, or anything that no run has written, or cannot be
        written; what was there is there then.
        """
        self.path = Path(path)
        self.rollouts_shown, self.passing_reward, self._claim, self._say = rollouts_shown, passing_reward, claim, say
        self.logs, self.metrics_path = self.path / "logs", self.path / "metrics.jsonl"
        self.episodes = EpisodeTable(self.path / EPISODES, components, answers=episode_answers)
        self._records = 0
        self._begun = resume_after is not None
        self._resume_after = resume_after
        self._events: EventWriter | None = None
        if resume_after is None:
            _refuse(self.path, overwrite)
        try:
            if resume_after is None:
                _make_room(self.path)
                (self.path / "config.yaml").write_text(dump(shown(config)), encoding="utf-8")
            else:
                self._drop_after(resume_after)
                _write_whole(self.path / "config.yaml", dump(shown(config)))
            _write_secrets(self.path / "secrets.yaml", hidden(config))
            for directory in (self.logs, self.path / "rollouts", self.path / "tensorboard"):
                directory.mkdir(parents=True, exist_ok=True)
            self._metrics, self._steps = Rows(self.metrics_path), Rows(self.path / "records.jsonl")
        except OSError as error:
            self._give_up()
            raise RunDirectoryError(cannot_write(self.path, error)) from error

    def _drop_after(self, step: int) -> None:
        before = self.metrics_path.read_bytes().count(b"\n") if self.metrics_path.is_file() else 0
        self._records = drop_rows(self.metrics_path, step, self.path / "dropped")
        if before > self._records:
            self._say(f"{before - self._records} rows of steps after {step} were moved to {self.path / 'dropped'}")
        drop_rows(self.path / "records.jsonl", step, self.path / "dropped")
        _drop_files(self.path / "rollouts", step, self.path / "dropped" / "rollouts")
        drop_episodes(self.path / EPISODES, step, self.path / "dropped" / EPISODES)
        drop_rows(self.path / "evaluations.jsonl", step, self.path / "dropped")
        for folder in sorted((self.path / "evaluations").glob("*/")):
            _drop_files(folder, step, self.path / "dropped" / "evaluations" / folder.name)
        (self.path / "summary.png").unlink(missing_ok=True)  # it says that a run is finished

    @classmethod
    def create(cls, config: Config, *, resume_after: int | None = None, claim: Claim | None = None) -> Self:
        """The directory that a run's configuration asks for."""
        return cls(
            config.run.directory,
            config.model_dump(mode="json"),
            overwrite=config.run.overwrite,
            rollouts_shown=config.run.rollouts_shown,
            passing_reward=config.data.curriculum.passing_reward,
            components=[reward.metric for reward in config.rewards] if config.environment is None else [],
            episode_answers=config.observe.episode_answers,
            resume_after=resume_after,
            claim=claim,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._begun:
            with contextlib.suppress(SamerouteError):  # what ended the run is told, not that this failed too
                if self._claim is not None:
                    self._claim.lock.check()
                self.episodes.write()
        self.close()
        if error is None or earlier.has_begun(self.path):  # the latter before its first step where a signal has saved
            self.begun()
        if not self._begun:
            self._give_up()
        if error is not None and (told := of_the_disk(error, self.path)) is not None:
            raise told from error

    def begun(self) -> None:
        """This run stands for itself from here on: an earlier one that it replaces is removed. A recorded step says so
        by itself."""
        if not self._begun:
            self._begun = True
            with writing(self.path):
                earlier.remove(self.path)

    def _give_up(self) -> None:
        """The run came to nothing. What it replaced is put back; where it replaced none, and had not started anything,
        nothing of it stays."""
        if self._begun or not self.path.is_dir():
            return
        if earlier.put_back(self.path):
            failed = self.path / earlier.FAILED
            self._say(
                f"the earlier run in {self.path} is as it was"
                + (f"; the logs of this start are in {failed / 'logs'}" if failed.is_dir() else "")
            )
        elif not (self.logs.is_dir() and any(self.logs.iterdir())):
            earlier.set_failed_aside(self.path)

    def close(self) -> None:
        """Close metrics and events. A second call does nothing."""
        self._metrics.close()
        self._steps.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def record(self, metrics: Mapping[str, float]) -> None:
        """One step's metrics, "step" among them, to metrics.jsonl and TensorBoard.

        Raises ValueError, naming the key, for a value that is no finite number, and DiskError where the disk does not
        take the row or the directory is no longer this run's; nothing is written then.
        """
        if "step" not in metrics:
            raise ValueError('the metrics of a step need the key "step"')
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"step {metrics['step']}: the metric {key!r} is {value}")
        # int() and float() turn numpy's scalars into what JSON knows.
        row = {key: int(v) if key == "step" else float(v) for key, v in metrics.items()}
        if self._claim is not None:
            self._claim.lock.check()
        self._metrics.append(json.dumps(row, allow_nan=False))
        self._records += 1
        self.begun()
        if self._events is None:
            from pipeline.observe.events import EventWriter

            self._events = EventWriter(self.path / "tensorboard", resume_after=self._resume_after)
        self._events.record(int(metrics["step"]), {key: v for key, v in row.items() if key != "step"})

    def is_ours(self) -> bool:
        """Whether no other run has taken the directory since."""
        try:
            if self._claim is not None:
                self._claim.lock.check()
        except DiskError:
            return False
        return True

    def to_disk(self) -> None:
        """Rows of finished steps survive a power cut from here on: a checkpoint is to come after them."""
        self.episodes.write()
        for rows in (self._metrics, self._steps):
            rows.to_disk()

    def write_step(self, result: StepResult, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> None:
        """A step's line of records.jsonl, its rows of episodes/, and `rollouts_shown` of its rollouts, readable in
        rollouts/step_NNNNNN.txt and token by token in rollouts/step_NNNNNN.json."""
        self.episodes.add(result, tokenizer)
        self._steps.append(json.dumps(step_record(result, objective, self.passing_reward), allow_nan=False))
        if not self.rollouts_shown:
            return
        shown = pick(result.batch.groups, self.rollouts_shown)
        file = self.path / "rollouts" / f"step_{result.batch.step:06d}.txt"
        tokens = shown_rollouts(result, tokenizer, self.rollouts_shown)
        with writing(file):
            _write_whole(file, "\n".join(rollout_text(*one, tokenizer) for one in shown))
            _write_whole(file.with_suffix(".json"), json.dumps(tokens, allow_nan=False))

    def record_evaluation(self, row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]] | None) -> Path | None:
        """A row of evaluations.jsonl, "step" and "set" in it, and the answers, whose file is returned. answers: None
        where the evaluation was left out. Raises DiskError as `record` does."""
        if self._claim is not None:
            self._claim.lock.check()
        file = None
        if answers is not None:
            file = self.path / "evaluations" / row["set"] / f"step_{row['step']:06d}.jsonl"
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(file, "".join(json.dumps(answer) + "\n" for answer in answers))
        rows = Rows(self.path / "evaluations.jsonl")
        try:
            rows.append(json.dumps(row, allow_nan=False))
            rows.to_disk()
        finally:
            rows.close()
        return file

    def hf_directory(self, model_path: str | Path, dtype: Dtype) -> Path:
        """hf/ with everything of a model directory but its weights, which are to be written in `dtype`."""
        target = self.path / "hf"
        write_companions(Path(model_path), target, dtype)
        return target

    def finish(self) -> None:
        """The run is over: close the files and draw summary.png (none for a run without a step)."""
        self.episodes.write()
        self.close()
        self.begun()
        if self._records:
            from pipeline.observe.summary import write_summary

            with writing(self.path / "summary.png"):
                write_summary(self.metrics_path, self.path / "summary.png")


def _write_secrets(file: Path, secrets: Mapping[str, Any]) -> None:
    file.unlink(missing_ok=True)  # of an earlier start, whatever its mode
    if secrets:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as target:
            target.write(dump({"base": "config.yaml", **secrets}))


def _refuse(path: Path, overwrite: bool) -> None:
    """Raise RunDirectoryError where a new run may not begin there. Nothing is touched."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file; set run.directory to another path")
    present = earlier.names(path) if path.is_dir() else []
    foreign = [name for name in present if name not in (*_FILES, *_DIRECTORIES)]
    if present and ("config.yaml" not in present or foreign):
        what = ", ".join((foreign or present)[:3])
        raise RunDirectoryError(f"{path} holds what no run has written ({what}); set run.directory to another path")
    if present and not overwrite and earlier.has_begun(path):
        raise RunDirectoryError(
            f"{path} holds a run already; set run.directory to another path, or run.overwrite=true to delete that run; "
            "it has no complete checkpoint to resume from"
        )


def _make_room(path: Path) -> None:
    """An earlier run goes aside. A start that came to no step stands in nobody's way."""
    path.mkdir(parents=True, exist_ok=True)
    if earlier.has_begun(path):
        earlier.set_aside(path)
    else:
        earlier.set_failed_aside(path)


def _write_whole(file: Path, text: str) -> None:
    """In one act: whoever reads while the run writes has the file before or after."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def drop_rows(file: Path, step: int, aside: Path) -> int:
    """Move a file's rows after a step, and a last one that is cut off, to a file of the same name in `aside`.

    Returns how many rows are left. The file changes in one act.
    """
    if not file.is_file():
        return 0
    kept, dropped = [], []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            late = not line.endswith("\n") or json.loads(line)["step"] > step
        except (json.JSONDecodeError, KeyError, TypeError):
            late = True
        (dropped if late else kept).append(line)
    if dropped:
        aside.mkdir(exist_ok=True)
        with (aside / file.name).open("a", encoding="utf-8") as target:
            target.writelines(line.rstrip("\n") + "\n" for line in dropped)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(file)
    return len(kept)


def _drop_files(directory: Path, step: int, aside: Path) -> None:
    for file in sorted(directory.glob("step_*")):
        if int(file.stem.removeprefix("step_")) > step:
            aside.mkdir(parents=True, exist_ok=True)
            file.replace(aside / file.name)
