"""Steps that were dumped, in the place of a server: the loop trains on them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.dumps.dump import Dump, read_dump, read_step
from pipeline.dumps.groups import DumpError

if TYPE_CHECKING:
    from megatron_ext.hf.description import ModelDescription
    from pipeline.config import Config


class DumpedSteps:
    """Dumps of consecutive steps. steps: their numbers, ascending."""

    def __init__(self, path: str | Path):
        """path: a dump, or a directory of them. Their headers are read, their arrays when their turn comes.

        Raises DumpError: nothing there, a file that is no dump, or a step missing between the first and the last.
        """
        self.path = Path(path)
        if not self.path.exists():
            raise DumpError(f"there is no dump {path}")
        files = sorted(self.path.glob("step_*.safetensors")) if self.path.is_dir() else [self.path]
        if not files:
            inside = self.path / "dumps"
            hint = f"; did you mean {inside}?" if inside.is_dir() else ", which debug.dump_rollouts=true writes"
            raise DumpError(f"{path} holds no step_*.safetensors{hint}")
        self.files: dict[int, Path] = {}
        for file in files:
            step = read_step(file)
            if step in self.files:
                raise DumpError(f"{self.files[step]} and {file} are both of step {step}; remove one")
            self.files[step] = file
        self.steps = sorted(self.files)
        absent = sorted(set(range(self.steps[0], self.steps[-1] + 1)) - set(self.steps))
        if absent:
            raise DumpError(
                f"{path} lacks step {', '.join(map(str, absent[:5]))}, without which the later ones do not follow; "
                "give a directory of consecutive steps, or a single file"
            )

    def read(self, step: int, config: Config, shape: ModelDescription) -> Dump:
        """The dump of a step. Raises DumpError where this configuration cannot train on it, saying what to change."""
        dump, file = read_dump(self.files[step]), self.files[step]
        rollouts = dump.batch.rollouts
        if not rollouts or not min(r.trained_tokens for r in rollouts):
            raise DumpError(f"{file}: a rollout has no response, so there is nothing to train on")
        longest = max(r.trained_tokens for r in rollouts)
        if longest > config.longest_rollout:
            field = "rollout.max_new_tokens" if config.environment is None else "environment.max_tokens"
            raise DumpError(f"{file}: a response has {longest} tokens; set {field}={longest}")
        if dump.temperature != config.precision.temperature:
            raise DumpError(
                f"{file}: its log-probs are at another temperature; set precision.temperature={dump.temperature}"
            )
        if (rollouts[0].kept is not None) != config.precision.masks_sampling:
            instead = "top_k=-1, top_p=1, min_p=0" if config.precision.masks_sampling else "top_k as its run had it"
            raise DumpError(f"{file}: its log-probs are over other tokens; set precision: {instead}")
        if config.replay.of_model(shape.num_experts).from_server and all(r.routes is None for r in rollouts):
            raise DumpError(f"{file}: it holds no routes; set replay=none")
        if config.teacher is not None and config.teacher.engine == "server":
            scores = [r.teacher for r in rollouts if r.teacher is not None]
            if len(scores) < len(rollouts):
                raise DumpError(
                    f"{file}: a teacher has not scored it; set teacher.engine=trainer, or leave teacher out"
                )
            wanted, k = config.objective.composition().teacher_top, min(s.top_k for s in scores)
            if wanted and k != wanted:
                raise DumpError(
                    f"{file}: a teacher gave its {k} likeliest tokens; set objective.distillation.top_k={k}"
                )
        for rollout in rollouts:
            try:
                rollout.check_model(shape, shape.vocab_size)
            except ValueError as error:
                raise DumpError(f"{file}: it is of another model: {error}") from error
        return dump
