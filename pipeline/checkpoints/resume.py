"""Whether a run is resumed, from which checkpoint, and whether the configuration still goes with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ext.config import LoraConfig
from megatron_ext.hf.companions import exported_config
from megatron_ext.hf.config_json import read_hf_config
from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Progress, read_progress
from pipeline.config import Config
from pipeline.config.secrets import shown
from pipeline.dumps.groups import DumpError
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.rollout.admission import Admission
from pipeline.rollout.saved import Saved, read_saved

# What decides a teacher's scores.
_TEACHING = ("teacher.path", "teacher.url", "objective.distillation.top_k")
# Where files lie, and what is kept: no part of what a run computes. Models are compared by themselves.
_INCIDENTAL = (
    "run.directory",
    "run.overwrite",
    "run.rollouts_shown",
    "checkpoint.",
    "evaluate",
    "debug.",
    "observe.",
    "alerts.",
    "cluster.",
    "model.path",
)
_NAMES_ONLY = {"architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}


class ResumeError(SamerouteError):
    """The run cannot be resumed; the message says why and what to do."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from, what to tell the user, a sentence each, and the rollouts that were made
    ahead; None where there were none, or are not wanted. pass_over: steps whose prompts are not asked again."""

    path: Path
    progress: Progress
    notes: list[str]
    saved: Saved | None = None
    pass_over: int = 0

    def past(self, step: int) -> Start:
        """The same, with the prompts of all steps up to this one passed over."""
        return replace(self, pass_over=max(0, step - self.progress.step))


def choose_start(config: Config, store: CheckpointStore, *, asked: bool) -> Start | None:
    """Where a run begins: at a checkpoint, or None: at the beginning.

    asked: by --resume. Without it a checkpoint counts unless run.overwrite deletes it. Raises ResumeError where none is
    there, or the newest is damaged or another model's.
    """
    latest = store.latest()
    if latest is None:
        if asked:
            raise ResumeError(
                f"{store.directory} holds no complete checkpoint to resume from; leave out --resume to begin at the "
                "beginning, with checkpoint.every_steps=N to have one next time"
            )
        return None
    if config.run.overwrite and not asked:
        return None
    try:
        progress = read_progress(latest)
    except CheckpointError as error:
        raise ResumeError(str(error)) from error
    _refuse(config, latest, progress)
    notes = [f"resuming from {latest}: {progress.step} steps are done"]
    if changed := differences(progress.config, shown(config.model_dump(mode="json"))):
        notes.append(f"changed since {latest.name} was saved: {', '.join(changed)}")
        if any(change.startswith("data.") for change in changed):
            notes.append(f"prompts go on at {progress.cursor['prompts']} of the new data")
    saved = _rollouts(config, latest, progress)
    if saved is not None and config.teacher is not None and any(change.startswith(_TEACHING) for change in changed):
        notes.append("what was sampled ahead is scored again, for what is asked of a teacher changed")
        saved = saved.unscored()
    if saved is not None and not config.rollout.max_staleness:
        notes.append(f"{len(saved.admission['open'])} groups that were sampled ahead are left out: max_staleness is 0")
        saved = None
    return Start(latest, progress, notes, saved)


def _rollouts(config: Config, path: Path, progress: Progress) -> Saved | None:
    """What a checkpoint has of asynchronous rollouts. Raises ResumeError where it is damaged, or cannot be trained on
    with this configuration."""
    rollout = config.rollout
    try:
        saved = read_saved(path, progress.cursor)
    except DumpError as error:
        raise ResumeError(f"{error}; remove {path} to resume from an older one") from error
    if saved is not None and rollout.max_staleness:
        rule = Admission(rollout.prompts_per_step, rollout.max_staleness, rollout.steps_ahead, order=rollout.order)
        try:
            rule.restore(saved.admission)
        except ValueError as error:
            was = progress.config["rollout"]
            raise ResumeError(
                f"{path} cannot be resumed: {error}. Set rollout.max_staleness={was['max_staleness']} and "
                f"rollout.prompts_per_step={was['prompts_per_step']} as they were, or rollout.max_staleness=0, which "
                "leaves these groups out"
            ) from error
    return saved


def _refuse(config: Config, path: Path, progress: Progress) -> None:
    """Raise ResumeError for what no checkpoint can be resumed into."""
    problems = []
    tiny = config.model.tiny
    wanted = read_hf_config(config.model.path) if config.model.path is not None else tiny.hf_config() if tiny else {}
    try:
        stored = read_hf_config(path / "hf")
    except FileNotFoundError as error:
        raise ResumeError(f"{error}; remove {path} to resume from an older checkpoint") from error
    # a checkpoint's config.json is that of a written model: the configuration's is compared as it would be written
    wanted, stored = (exported_config(hf, config.precision.weights) for hf in (wanted, stored))
    for key in sorted((wanted.keys() & stored.keys()) - _NAMES_ONLY):
        if wanted[key] != stored[key]:
            problems.append(f"the model's {key} is {stored[key]} in it, {wanted[key]} in the configuration")
    try:
        saved = Config.model_validate(progress.config)
    except ValidationError as error:
        raise ResumeError(f"{path} was saved by another version of sameroute: {error}") from error
    if (was := saved.precision.weights) != (now := config.precision.weights):
        problems.append(f"precision.weights is {was} in it, {now} in the configuration")
    problems += _other_adapters(saved.lora, config.lora)
    had, needs = saved.objective.composition(), config.objective.composition()
    if needs.needs_critic and not had.needs_critic:
        problems.append("it holds no critic, which the objective needs")
    if needs.needs_reference and not had.needs_reference:
        problems.append("it holds no reference, which the objective needs")
    if problems:
        raise ResumeError(
            f"{path} cannot be resumed: {'; '.join(problems)}. Change that back, or set run.directory to another path "
            "(run.overwrite=true without --resume deletes the run and begins anew)"
        )


def _other_adapters(was: LoraConfig | None, now: LoraConfig | None) -> list[str]:
    """What is wrong with adapters that would go on as others, a sentence each."""
    if was is None or now is None:
        held = "a whole model" if was is None else "adapters alone"
        return [] if was is now else [f"it holds {held}, and lora is {'left out' if now is None else 'given'}"]
    mine, theirs = now.model_dump(), was.model_dump()
    return [
        f"lora.{name} is {theirs[name]} in it, {mine[name]} in the configuration"
        for name in mine
        if mine[name] != theirs[name]
    ]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields of a configuration that differ, "train.lr=1e-05 (was 1e-06)", but for those that compute nothing."""
    old, new = _flat(before), _flat(after)
    return [
        f"{key}={new.get(key)} (was {old.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_INCIDENTAL)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, node in tree.items() for key, value in _flat(node, f"{prefix}{name}.").items()}
