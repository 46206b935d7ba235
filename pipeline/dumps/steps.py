"""Steps that were dumped, in the place of a server: the loop trains on them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.dumps.dump import Dump, DumpError, read_dump, read_step

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
        rollouts = [r for g in dump.groups for r in g.rollouts]
        lengths = [len(r) for r in rollouts]
        largest = max(int(ids.max(initial=0)) for r in rollouts for ids in (r.prompt_ids, r.response_ids))
        if largest >= shape.vocab_size:
            raise DumpError(f"{file}: token id {largest} is outside the model's vocabulary of {shape.vocab_size}")
        if not min(lengths):
            raise DumpError(f"{file}: a rollout has no response, so there is nothing to train on")
        if max(lengths) > config.rollout.max_new_tokens:
            raise DumpError(f"{file}: a response has {max(lengths)} tokens; set rollout.max_new_tokens={max(lengths)}")
        if dump.temperature != config.precision.temperature:
            raise DumpError(
                f"{file}: its log-probs are at another temperature; set precision.temperature={dump.temperature}"
            )
        if (rollouts[0].kept is not None) != config.precision.masks_sampling:
            instead = "top_k=-1, top_p=1, min_p=0" if config.precision.masks_sampling else "top_k as its run had it"
            raise DumpError(f"{file}: its log-probs are over other tokens; set precision: {instead}")
        largest = max((int(r.kept.max(initial=0)) for r in rollouts if r.kept is not None), default=0)
        if largest >= shape.vocab_size:
            raise DumpError(f"{file}: kept token {largest} is outside the model's vocabulary of {shape.vocab_size}")
        routes = [r.routes for r in rollouts if r.routes is not None]
        if config.replay == "r3" and shape.num_experts and not routes:
            raise DumpError(f"{file}: it holds no routes; set replay=none")
        for rows in routes:
            if rows.shape[1:] != (shape.num_layers, shape.topk):
                raise DumpError(
                    f"{file}: its routes are for {rows.shape[1]} layers, top {rows.shape[2]}; the model has "
                    f"{shape.num_layers}, top {shape.topk}"
                )
            if rows.max(initial=0) >= shape.num_experts:
                raise DumpError(f"{file}: expert {rows.max()} is outside the model's {shape.num_experts}")
        return dump
