"""The answers of a run, graded again: by the same rewards, which then should say the same, or by others.

RUN/regraded.parquet has a row an answer: prompt, sample, step, reward_before, failure_before, reward, failure, changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.disk.disk_errors import writing
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.observe.episodes import FOLDER
from pipeline.rewards import Grader, Question
from pipeline.types import Prompt

FILE = "regraded.parquet"
_SHOWN = 20


class RegradeError(SamerouteError):
    """There is nothing to grade again; the message says why."""

    exit_code = NOT_STARTED


@dataclass
class Comparison:
    """rows: of RUN/regraded.parquet; `answer` is beside them, for those that changed."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        both = [r for r in self.rows if r["reward_before"] is not None and r["reward"] is not None]
        changed = [r for r in self.rows if r["changed"]]
        lines = [f"{len(self.rows):,} answers graded again, {len(self.rows) - len(changed):,} of them the same"]
        if both:
            lines[0] += f" ({1 - len(changed) / len(self.rows):.2%})"
            before, now = (np.mean([r[key] for r in both]) for key in ("reward_before", "reward"))
            lines.append(f"mean reward of the {len(both):,} graded both times: {before:.4f} before, {now:.4f} now")
        failed = [sum(r[key] is not None for r in self.rows) for key in ("failure_before", "failure")]
        lines.append(f"without a reward: {failed[0]:,} before, {failed[1]:,} now")
        lines += [f"  prompt {r['prompt']}, sample {r['sample']}: {_words(r)}" for r in changed[:_SHOWN]]
        return "\n".join(lines + ([f"  and {len(changed) - _SHOWN:,} more"] if len(changed) > _SHOWN else []))


def _words(row: dict[str, Any]) -> str:
    before, now = (
        f"no reward ({row[why][:80]})" if row[reward] is None and row[why] else f"{row[reward]}"
        for reward, why in (("reward_before", "failure_before"), ("reward", "failure"))
    )
    return f"{before} -> {now}  {row['answer'][:80]!r}"


def regrade(run: Path, grader: Grader) -> Comparison:
    """Grade every kept answer of a run again, and write RUN/regraded.parquet, whole or not at all.

    Raises RegradeError for a run without kept answers, DiskError, and what Grader.ask raises.
    """
    import pyarrow
    import pyarrow.parquet

    parts = sorted((run / FOLDER).glob("part_*.parquet"))
    if not parts:
        raise RegradeError(f"{run / FOLDER} has no answers; name the directory of a run that has trained")
    found = Comparison()
    with grader:
        for part in parts:
            rows = [row for row in pyarrow.parquet.read_table(part).to_pylist() if row["answer"] is not None]
            verdicts = grader.ask(_questions(rows))
            for row, verdict in zip(rows, verdicts, strict=True):
                told = {key: row[key] for key in ("prompt", "sample", "step", "answer")}
                told |= {"reward_before": row["reward"], "failure_before": row["failure"]}
                failure = None if verdict.kind is None else f"the verifier {verdict.verifier!r} {verdict.what}"
                changed = not _same(row["reward"], verdict.reward)
                found.rows.append(told | {"reward": verdict.reward, "failure": failure, "changed": changed})
    if not found.rows:
        raise RegradeError(f"{run / FOLDER} has no texts of answers: the run had observe.episode_answers=false")
    names = ("prompt", "sample", "step", "reward_before", "failure_before", "reward", "failure", "changed")
    target, partial = run / FILE, run / f".{FILE}.partial"
    with writing(target):
        pyarrow.parquet.write_table(
            pyarrow.table({name: [row[name] for row in found.rows] for name in names}), partial, compression="zstd"
        )
        partial.replace(target)
    return found


def _questions(rows: list[dict[str, Any]]) -> Iterator[Question]:
    for row in rows:
        ids = np.array(row["prompt_ids"], np.int32)
        prompt = Prompt(ids, row["prompt_text"], json.loads(row["metadata"]), row["prompt"], row["origin"])
        answer = np.array(row["answer_ids"], np.int32)
        yield Question(prompt, row["answer"], answer, row["finish_reason"], row["trained_tokens"])


def _same(before: float | None, now: float | None) -> bool:
    """Rewards of float32, and none is none."""
    if before is None or now is None:
        return before is now
    return math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-6)
