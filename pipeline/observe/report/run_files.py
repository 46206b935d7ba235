"""A run directory as the report reads it: also while the run writes to it, and whatever it lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.text.yaml_text import YamlError, parse

_LARGEST = 1.7e308  # of a float64; nan is not below it either


class ReportError(SamerouteError):
    """There is no run to report on; the message says where it was looked for."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class Run:
    """What a run has written so far.

    config:  config.yaml as plain values.
    metrics: a row of numbers a step, in the order of the steps.
    records: step -> its line of records.jsonl.
    evaluations: rows of evaluations.jsonl, of one that is there twice the later.
    notes:   what could not be read, a sentence each.
    """

    path: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    records: Mapping[int, Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default_factory=list)

    @property
    def steps(self) -> np.ndarray:
        """[steps] int64."""
        return np.array([row["step"] for row in self.metrics], np.int64)

    @property
    def planned(self) -> int | None:
        """Steps that the configuration asks for."""
        steps = self.setting("train", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        """The picture is the last thing that a run writes."""
        return (self.path / "summary.png").is_file()

    def has(self, key: str) -> bool:
        """Whether any step has this metric."""
        return any(key in row for row in self.metrics)

    def column(self, key: str) -> np.ndarray:
        """[steps] float64 of a metric, nan where a step lacks it."""
        return np.array([row.get(key, math.nan) for row in self.metrics], np.float64)

    def setting(self, *keys: str) -> Any:
        """A value of the configuration; None where it is not there."""
        node: Any = self.config
        for key in keys:
            if not isinstance(node, Mapping):
                return None
            node = node.get(key)
        return node

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """The rollouts of a step as step_record.shown_rollouts made them; none where the step has no file.

        Raises ReportError for a file that holds anything else.
        """
        file = self.path / "rollouts" / f"step_{step:06d}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        except ValueError as error:
            raise ReportError(f"{file} is not JSON: {error}; remove it to leave these rollouts out") from error


def read_run(path: str | Path) -> Run:
    """Read a run directory. Raises ReportError where the path is none."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise ReportError(f"{path} is no run directory: it has no config.yaml")
    notes: list[str] = []
    try:
        config = parse((path / "config.yaml").read_text(encoding="utf-8")) or {}
    except YamlError as error:
        config = {}
        notes.append(f"config.yaml is not YAML: {error}")
    metrics = _numbers(_lines(path / "metrics.jsonl", notes), notes)
    records = _lines(path / "records.jsonl", notes)
    return Run(path, config, metrics, records, _evaluations(path / "evaluations.jsonl", notes), notes)


def _evaluations(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """In the order of the steps."""
    if not path.is_file():
        return []
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[int(row["step"]), str(row["set"])] = row
        except (json.JSONDecodeError, TypeError, KeyError, ValueError, OverflowError):
            notes.append(f"{path.name}, line {number}, is left out: it is no evaluation of a step")
    return [row for _, row in sorted(rows.items())]


def _lines(path: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """step -> object of a file of JSON lines, ordered by step; of a step that is there twice, the later."""
    if not path.is_file():
        return {}
    rows: dict[int, dict[str, Any]] = {}
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (json.JSONDecodeError, TypeError, KeyError, ValueError, OverflowError):
            notes.append(f"{path.name}, line {number}, is left out: it is no object with a step")
            continue
        if step in rows:
            notes.append(f"{path.name} has step {step} twice; the later counts")
        rows[step] = row
    return dict(sorted(rows.items()))


def _numbers(rows: Mapping[int, Mapping[str, Any]], notes: list[str]) -> list[dict[str, float]]:
    """Metrics without what is no finite number."""
    out: list[dict[str, float]] = []
    for step, row in rows.items():
        numbers: dict[str, float] = {}
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
                numbers[key] = float(value)
            else:
                notes.append(f"step {step}: {key} is {str(value)[:80]}, no finite number, and is left out")
        out.append(numbers | {"step": step})
    return out
