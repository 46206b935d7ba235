"""What a step trained on, as one file that can be read again without a server: dumps/step_000012.safetensors.

It holds the arrays of `pipeline.dumps.groups`, and in its header: format, format_version, step, weight_version,
temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.dumps.groups import DumpError, groups_of, open_groups, write_groups
from pipeline.step import Batch


@dataclass(frozen=True)
class Dump:
    """One step's batch, and the temperature of its log-probs."""

    batch: Batch
    temperature: float


def dump_path(directory: Path, step: int) -> Path:
    """Where a step's dump lies."""
    return directory / f"step_{step:06d}.safetensors"


def write_dump(directory: Path, dump: Dump) -> Path:
    """Write a step into a directory, which is made where there is none; returns the file.

    Raises DumpError for an ungraded episode, and as `write_groups` does.
    """
    for group in dump.batch.groups:
        if not group.graded:
            raise DumpError(f"prompt {group.prompt.index} has an episode without a reward")
    header = {
        "step": str(dump.batch.step),
        "weight_version": str(dump.batch.version),
        "temperature": repr(float(dump.temperature)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    target = dump_path(directory, dump.batch.step)
    write_groups(target, dump.batch.groups, header)
    return target


def read_dump(path: str | Path) -> Dump:
    """Read a file that `write_dump` wrote. Raises DumpError for any other, naming what is wrong with it."""
    path = Path(path)
    header, arrays = open_groups(path)
    _check_numbers(path, header)
    batch = Batch(int(header["step"]), int(header["weight_version"]), groups_of(path, arrays))
    return Dump(batch, float(header["temperature"]))


def read_step(path: str | Path) -> int:
    """The step of a dump, from its header alone. Raises DumpError for a file that is no dump, or not a whole one."""
    header, _ = open_groups(Path(path), header_only=True)
    _check_numbers(Path(path), header)
    return int(header["step"])


def _check_numbers(path: Path, header: dict[str, str]) -> None:
    for name, read in (("step", int), ("weight_version", int), ("temperature", float)):
        _number(path, header, name, read)


def _number(path: Path, header: dict[str, str], name: str, read: Callable[[str], float]) -> None:
    try:
        value = read(header[name])
    except (KeyError, ValueError) as error:
        raise DumpError(f"{path}: its header has no number {name}, but {header.get(name)!r}") from error
    if not (math.isfinite(value) and value >= 0):
        raise DumpError(f"{path}: its header has {name} {value}")
