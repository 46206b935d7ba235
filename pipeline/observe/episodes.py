"""Every episode of a run as one table of Parquet: RUN/episodes/part_000001.parquet, ...

A row is an answer that was graded. A part has the rows of some steps in a row and is named by the first of them; it is
there whole or not at all. Rows of up to EVERY steps are in memory; a checkpoint brings them to the disk before it
counts, and a run that is resumed drops those of later steps.

    recorded          int32    the step whose record came with it
    step              int32    that trained on it; null: none
    prompt, sample    int64, int32    index of the prompt, number of the answer in its group as it was graded
    origin            string   where the prompt is from, the same each time it is drawn
    prompt_text       string
    metadata          string   JSON, what the verifier was told of the prompt
    ended             string   trained, uninformative (rewards of its group do not differ), failed (see failure)
    failure           string   why there is no reward; null: there is one
    reward            float32
    turns, turn_rewards    int32, list<float32>    of a conversation; null rewards: all of it is the last turn's
    reward/NAME       float32  of each component, before its weight; null: it failed, or is not known
    first_version, last_version    int32    of the weights that sampled its tokens; null: no token
    prompt_tokens, tokens, trained_tokens   int32
    finish_reason     string
    servers           list<int32>    numbers of the servers that sampled it
    sample_s, grade_s float32  seconds; null: not known
    prompt_ids, answer_ids   list<int32>    and
    answer            string   of the last rollout; null where observe.episode_answers is false
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.disk.disk_errors import writing
from pipeline.rewards import response_text
from pipeline.step import StepResult
from pipeline.types import Episode, Group

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

    from pipeline.types import Ended

FOLDER = "episodes"
EVERY = 10
"""Steps of a part at most."""
_MOST_TOKENS = 4_000_000
"""In memory, of answers, before a part is written."""


class EpisodeTable:
    """RUN/episodes, open for writing."""

    def __init__(self, folder: Path, components: Sequence[str] = (), *, answers: bool = True):
        """components: names of the reward's, as far as they are known beforehand: an environment names its own as it
        goes. answers: keep what was asked and answered, to grade it again."""
        self.folder, self.answers = folder, answers
        self._rows: list[dict[str, Any]] = []
        self._components = dict.fromkeys(components)

    def add(self, result: StepResult, tokenizer: PreTrainedTokenizerBase) -> None:
        """What a step trained on, and the groups that ended since the step before. Raises DiskError."""
        number = result.batch.step
        for group in result.batch.groups:
            self._add(group, number, None, tokenizer)
        self.add_ended(number, result.ended, tokenizer)
        tokens = sum(row["tokens"] for row in self._rows)
        if self._rows and (number - self._rows[0]["recorded"] + 1 >= EVERY or tokens >= _MOST_TOKENS):
            self.write()

    def add_ended(self, recorded: int, ended: Sequence[Ended], tokenizer: PreTrainedTokenizerBase) -> None:
        """Groups that no step trains on, with the record of step `recorded`."""
        for one in ended:
            self._add(one.group, recorded, one.end, tokenizer)

    def _add(self, group: Group, recorded: int, end: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        prompt = group.prompt
        shared: dict[str, Any] = {
            "recorded": recorded,
            "prompt": prompt.index,
            "origin": prompt.origin,
            "prompt_tokens": len(prompt.ids),
        }
        if self.answers:
            shared |= {
                "prompt_text": prompt.text,
                "metadata": json.dumps(prompt.metadata),
                "prompt_ids": prompt.ids,
            }
        for sample, episode in enumerate(group.episodes):
            ended = "failed" if episode.failure is not None else end or "trained"
            self._components |= dict.fromkeys(episode.parts)
            row = shared | {"sample": sample, "ended": ended, "step": recorded if ended == "trained" else None}
            self._rows.append(row | _row(episode) | (_answer(episode, tokenizer) if self.answers else {}))

    def write(self) -> None:
        """All rows so far to the disk, as a part: they survive a power cut. Raises DiskError."""
        if not self._rows:
            return
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(self._rows, schema=schema(list(self._components)))
        target = part_path(self.folder, min(row["recorded"] for row in self._rows))
        with writing(target):
            self.folder.mkdir(exist_ok=True)
            _replace(target, table)
        self._rows = []


def schema(components: Sequence[str]) -> pyarrow.Schema:
    """Of a part, whose reward has these components."""
    import pyarrow as pa

    kept = pa.dictionary(pa.int32(), pa.string())
    fields: dict[str, pa.DataType] = {"recorded": pa.int32(), "step": pa.int32(), "prompt": pa.int64()}
    fields |= {"sample": pa.int32(), "origin": pa.string(), "prompt_text": pa.string(), "metadata": pa.string()}
    fields |= {"ended": kept, "failure": pa.string(), "note": pa.string(), "reward": pa.float32()}
    fields |= {"turns": pa.int32(), "turn_rewards": pa.list_(pa.float32())}
    fields |= {f"reward/{name}": pa.float32() for name in components}
    names = ("first_version", "last_version", "prompt_tokens", "tokens", "trained_tokens")
    fields |= dict.fromkeys(names, pa.int32())
    fields |= {"finish_reason": kept, "servers": pa.list_(pa.int32()), "sample_s": pa.float32()}
    fields |= {"grade_s": pa.float32(), "prompt_ids": pa.list_(pa.int32()), "answer_ids": pa.list_(pa.int32())}
    return pa.schema(list((fields | {"answer": pa.string()}).items()))


def part_path(folder: Path, step: int) -> Path:
    """Of the part whose first rows came with a step."""
    return folder / f"part_{step:06d}.parquet"


def drop_episodes(folder: Path, step: int, aside: Path) -> None:
    """Move rows that came with later steps to parts of the same names in `aside`. Each part changes in one act."""
    import pyarrow
    import pyarrow.parquet

    for rest in folder.glob(".*.partial"):
        rest.unlink()
    for part in sorted(folder.glob("part_*.parquet")):
        table = pyarrow.parquet.read_table(part)
        late = table["recorded"].to_numpy() > step
        if not late.any():
            continue
        aside.mkdir(parents=True, exist_ok=True)
        if int(part.stem.removeprefix("part_")) > step:
            part.replace(aside / part.name)
        else:
            _replace(aside / part.name, table.filter(pyarrow.array(late)))
            _replace(part, table.filter(pyarrow.array(~late)))


def _replace(target: Path, table: pyarrow.Table) -> None:
    """The file, whole, at its place, or nothing."""
    import pyarrow.parquet

    partial = target.with_name(f".{target.name}.partial")
    try:
        pyarrow.parquet.write_table(table, partial, compression="zstd")
        for path in (partial, target.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _row(episode: Episode) -> dict[str, Any]:
    rollouts = episode.rollouts
    versions = [int(v) for r in rollouts if r.trained_tokens for v in _ends(r.weight_versions[r.trained])]
    seconds = sum(rollout.seconds for rollout in rollouts)
    row: dict[str, Any] = {
        "failure": episode.failure,
        "note": episode.note or None,
        "reward": episode.reward,
        "turns": episode.turns,
        "turn_rewards": episode.turn_rewards,
        "first_version": min(versions, default=None),
        "last_version": max(versions, default=None),
        "tokens": sum(map(len, rollouts)),
        "trained_tokens": sum(rollout.trained_tokens for rollout in rollouts),
        "finish_reason": episode.last.finish_reason,
        "servers": sorted({server for rollout in rollouts for server in rollout.servers}),
        "sample_s": seconds or None,
        "grade_s": episode.grade_s,
    }
    return row | {f"reward/{name}": reward for name, reward in episode.parts.items()}


def _ends(versions: Any) -> tuple[int, int]:
    return versions.min(), versions.max()


def _answer(episode: Episode, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    text = response_text(episode.last, tokenizer) if episode.answer is None else episode.answer
    return {"answer": text, "answer_ids": episode.last.response_ids}
