"""What a checkpoint has of asynchronous rollouts: finished groups, open ones with what there is of them, and the rule.

rollouts/admission.json         the state of the rule, and the prompts and sample numbers of open groups
rollouts/finished.safetensors   groups that no step has taken, as a dump has them
rollouts/open.safetensors       answers of open groups and parts of some, not graded
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dumps.groups import DumpError, read_groups, write_groups
from pipeline.types import Ended, Group, Opening, Prompt, Rollout

FOLDER = "rollouts"
_STATE, _FINISHED, _OPEN = "admission.json", "finished.safetensors", "open.safetensors"


@dataclass(frozen=True)
class Saved:
    """admission: see Admission.state. cursor: of the prompts. finished: by prompt. open: by prompt, itself and its
    answers by sample, parts with finish_reason "abort" among them. ended: untrained since the last step took its
    groups, to be recorded with this checkpoint; no file of it has them."""

    admission: dict[str, Any]
    cursor: dict[str, Any]
    finished: Mapping[int, Group]
    open: Mapping[int, tuple[Prompt, Mapping[int, Rollout]]]
    ended: Sequence[Ended] = ()

    def unscored(self) -> Saved:
        """Without what a teacher said, for another to say."""
        finished = {index: _unscored(group) for index, group in self.finished.items()}
        open_ = {
            index: (prompt, {n: dataclasses.replace(rollout, teacher=None) for n, rollout in own.items()})
            for index, (prompt, own) in self.open.items()
        }
        return dataclasses.replace(self, finished=finished, open=open_)

    def write(self, checkpoint: Path) -> None:
        """Into the directory of a checkpoint that is being written."""
        folder = checkpoint / FOLDER
        folder.mkdir()
        if self.finished:
            write_groups(folder / _FINISHED, list(self.finished.values()))
        begun = [Group.of_single_turns(p, [own[n] for n in sorted(own)]) for p, own in self.open.values() if own]
        if begun:
            write_groups(folder / _OPEN, begun)
        written = [folder / name for name in (_FINISHED, _OPEN) if (folder / name).exists()]
        tree = {
            "admission": self.admission,
            "open": [_row(prompt) | {"samples": sorted(own)} for prompt, own in self.open.values()],
            "crc32": {file.name: zlib.crc32(file.read_bytes()) for file in written},
        }
        (folder / _STATE).write_text(json.dumps(tree))


def _unscored(group: Group) -> Group:
    episodes = [
        dataclasses.replace(e, rollouts=tuple(dataclasses.replace(r, teacher=None) for r in e.rollouts))
        for e in group.episodes
    ]
    return dataclasses.replace(group, episodes=tuple(episodes))


def _row(prompt: Prompt) -> dict[str, Any]:
    return dataclasses.asdict(prompt) | {"ids": prompt.ids.tolist()}


def read_saved(checkpoint: Path, cursor: dict[str, Any]) -> Saved | None:
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
        finished, begun = (read_groups(folder / n) if n in tree["crc32"] else () for n in (_FINISHED, _OPEN))
        rollouts, open_ = {group.prompt.index: group.rollouts for group in begun}, {}
        for row in tree["open"]:
            samples, ids = row.pop("samples"), np.array(row.pop("ids"), np.int32)
            own = dict(zip(samples, rollouts.get(row["index"], []), strict=True))
            opening = None if (said := row.pop("opening", None)) is None else Opening(**said)
            open_[row["index"]] = Prompt(ids, **row, opening=opening), own
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, DumpError) else DumpError(f"{folder} is damaged: {error}") from error
    return Saved(tree["admission"], cursor, {g.prompt.index: g for g in finished}, open_)
