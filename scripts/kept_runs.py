"""Runs of a benchmark that are kept: one JSON file each, made once, whole or broken, never made again by themselves.

    OUT/gspo_0_r3_seed_0.json: {"settings": [...], "rows": [{...}, ...], "broken": null}

A run that ends with an error is kept too, with its sentence and the steps that it made: a benchmark that tried it again
until it held would hide that. Delete the file to have it made again. A run that was killed leaves no file.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import load_config
from pipeline.errors import SamerouteError
from pipeline.loop.run import train

EDGE = 5  # steps of either end that a reward is the mean of


@dataclass(frozen=True)
class KeptRun:
    """rows: metrics, a step each. broken: the sentence that it ended with; None: it is whole."""

    rows: list[dict[str, float]]
    broken: str | None

    def mean(self, key: str) -> float:
        """Over its steps; NaN where no step has it."""
        values = [row[key] for row in self.rows if key in row]
        return statistics.fmean(values) if values else float("nan")

    def largest(self, *keys: str) -> float:
        """Of all its steps and these keys; NaN where no step has any."""
        return max((row[key] for row in self.rows for key in keys if key in row), default=float("nan"))

    def first(self, count: int = EDGE) -> float:
        return _reward(self.rows[:count])

    def last(self, count: int = EDGE) -> float:
        """Mean reward of its last steps."""
        return _reward(self.rows[-count:])


def _reward(rows: list[dict[str, float]]) -> float:
    return statistics.fmean(row["reward/mean"] for row in rows)


def look(file: Path, settings: Sequence[str]) -> KeptRun | None:
    """The run that is kept there; None: there is none. Ends the program where it was made with other settings."""
    if not file.exists():
        return None
    kept = json.loads(file.read_text())
    if kept["settings"] != list(settings):
        raise SystemExit(f"{file} was made with other settings, {' '.join(kept['settings'])}; give another folder")
    return KeptRun(kept["rows"], kept["broken"])


def keep(file: Path, settings: Sequence[str], make: Callable[[], Iterable[dict[str, float]]]) -> KeptRun:
    """The run that is kept there, made where there is none.

    make: yields its steps' metrics. A SamerouteError breaks the run and is kept; any other error is a mistake of the
    code, and leaves nothing.
    """
    if (kept := look(file, settings)) is not None:
        return kept
    rows, broken = [], None
    try:
        rows.extend(make())
    except SamerouteError as error:
        broken = str(error)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    half.write_text(json.dumps({"settings": list(settings), "rows": rows, "broken": broken}))
    os.replace(half, file)
    return KeptRun(rows, broken)


def keep_training(directory: Path, config: Path, settings: Sequence[str]) -> KeptRun:
    """A whole run of `sameroute train`, into the directory, and kept beside it."""

    def steps() -> Iterable[dict[str, float]]:
        train(load_config(config, [f"run.directory={directory}", *settings]))
        yield from map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())

    return keep(directory.with_name(f"{directory.name}.json"), settings, steps)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """In Markdown."""
    lines = [" | ".join(row) for row in (titles, *rows)]
    print("\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(titles)), *lines[1:]]))
