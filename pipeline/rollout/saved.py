"""What a checkpoint has of asynchronous rollouts: finished groups, open ones with what there is of them, and the rule.

rollouts/admission.json         the state of the rule, the cursor, and which samples of open groups are there
rollouts/finished.safetensors   groups that no step has taken, as a dump has them
rollouts/open.safetensors       open groups of which there are answers or parts of some, not graded
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dumps.groups import DumpError, read_groups, write_groups
from pipeline.types import Group, Prompt, Rollout

FOLDER = "rollouts"
_STATE, _FINISHED, _OPEN = "admission.json", "finished.safetensors", "open.safetensors"


@dataclass(frozen=True)
class Saved:
    """admission: see Admission.state. cursor: of the prompts. finished: by prompt. open: by prompt, itself and its
    answers by sample, parts with finish_reason "abort" among them; a group that is not here begins anew."""

    admission: dict[str, Any]
    cursor: dict[str, int]
    finished: Mapping[int, Group]
    open: Mapping[int, tuple[Prompt, Mapping[int, Rollout]]]

    def write(self, checkpoint: Path) -> None:
        """Into the directory of a checkpoint that is being written."""
        folder = checkpoint / FOLDER
        folder.mkdir()
        begun = {index: own for index, own in self.open.items() if own[1]}
        samples = {str(index): sorted(sampled) for index, (_, sampled) in begun.items()}
        if self.finished:
            write_groups(folder / _FINISHED, list(self.finished.values()))
        if begun:
            groups = [Group.of_single_turns(p, [sampled[n] for n in sorted(sampled)]) for p, sampled in begun.values()]
            write_groups(folder / _OPEN, groups)
        written = [folder / name for name in (_FINISHED, _OPEN) if (folder / name).exists()]
        sums = {file.name: zlib.crc32(file.read_bytes()) for file in written}
        tree = {"admission": self.admission, "samples": samples, "crc32": sums}
        (folder / _STATE).write_text(json.dumps(tree))


def read_saved(checkpoint: Path, cursor: dict[str, int]) -> Saved | None:
    """Of a complete checkpoint; None for one of a synchronous run. cursor: that it was saved with.

    Raises DumpError for files that are damaged.
    """
    folder = checkpoint / FOLDER
    if not folder.is_dir():
        return None
    try:
        tree = json.loads((folder / _STATE).read_text())
        for name, expected in tree["crc32"].items():
            if zlib.crc32((folder / name).read_bytes()) != expected:
                raise DumpError(f"{folder / name} is damaged: its bytes are not those that were written")
    except (OSError, KeyError, ValueError) as error:
        raise error if isinstance(error, DumpError) else DumpError(f"{folder} is damaged: {error}") from error
    finished, open_ = (read_groups(folder / n) if n in tree["crc32"] else () for n in (_FINISHED, _OPEN))
    begun = {}
    for group in open_:
        numbers = tree["samples"][str(group.prompt.index)]
        begun[group.prompt.index] = group.prompt, dict(zip(numbers, group.rollouts, strict=True))
    return Saved(tree["admission"], cursor, {g.prompt.index: g for g in finished}, begun)
