"""A file of JSON lines: every line is read once at the start, and again when its prompt is asked; none is kept."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.chat import DataError
from pipeline.text.characters import decode_lines, has_surrogate, text_start

_BLOCK = 1 << 22  # bytes read at once
_DEEPEST = 64  # lists and objects inside one another; what writes rollouts recurses too
_MOST_DIGITS = 4300  # of an integer that Python reads and writes


class JsonlTable:
    """The lines of a file that are not blank, by where they begin: 16 bytes each."""

    def __init__(self, path: Path):
        """Raises DataError where there is no such file, or no text in it."""
        self.path, self.place = path, str(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115  (as long as the run)
            head = self._file.read(8)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"there is no data file {path}") from error
        except OSError as error:
            raise DataError(f"the data file {path} cannot be read: {error.strerror}") from error
        try:
            self._begin = text_start(head)
        except ValueError as error:
            raise DataError(f"{path}, {error}") from error
        self._stamp = self._now()
        self._starts, self._lines = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> str:
        """By the line's number from 1."""
        return f"{self.path}, line {self._lines[row]}"

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        """Every line that is not blank: its object, or what is wrong with it (not UTF-8, not JSON, a key twice, what
        could not be written again)."""
        starts, lines = self._starts, self._lines
        for offset, number, raw in self._blocks():
            at = offset
            for i, (line, size) in enumerate(_decoded(raw, number)):
                if isinstance(line, DataError) or line.strip():
                    starts.append(at)
                    lines.append(number + i)
                    yield len(starts) - 1, line if isinstance(line, DataError) else _result(line)
                at += size + 1

    def record(self, row: int) -> dict[str, Any]:
        """The object of a line. Raises DataError where the file has changed since it was scanned."""
        if self._now() != self._stamp:
            raise DataError(f"{self.path} was changed while the run reads it; begin again, or put the old file back")
        end = self._starts[row + 1] if row + 1 < len(self) else self._stamp[0]
        raw = os.pread(self._file.fileno(), end - self._starts[row], self._starts[row])
        return read_object(raw.partition(b"\n")[0].decode("utf-8"))

    def _blocks(self) -> Iterator[tuple[int, int, bytes]]:
        """Whole lines of some megabytes, with where they begin and the number of the first."""
        self._file.seek(self._begin)
        offset, number, left = self._begin, 1, b""
        while block := self._file.read(_BLOCK):
            cut = block.rfind(b"\n") + 1
            if not cut:
                left += block
                continue
            raw, left = left + block[: cut - 1], block[cut:]
            yield offset, number, raw
            offset, number = offset + len(raw) + 1, number + raw.count(b"\n") + 1
        if left:
            yield offset, number, left

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def _decoded(raw: bytes, first: int) -> Iterator[tuple[str | DataError, int]]:
    """Each line, or what is wrong with its bytes, and how many bytes it has."""
    try:
        lines = decode_lines(raw, first).split("\n")
    except ValueError:
        for number, line in enumerate(raw.split(b"\n"), start=first):
            try:
                yield decode_lines(line, number), len(line)
            except ValueError as error:
                yield DataError(str(error).partition(": ")[2]), len(line)
        return
    for line in lines:
        yield line, len(line) if line.isascii() else len(line.encode())


def _result(line: str) -> dict[str, Any] | DataError:
    try:
        return read_object(line)
    except DataError as error:
        return error


def read_object(line: str) -> dict[str, Any]:
    """The object of one line. Raises DataError for what is no JSON, or could not be written again."""
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        if "\r" in line.strip():
            raise DataError(
                "lines of this file end in CR alone; write it with LF, for example with tr '\\r' '\\n'"
            ) from error
        if line.strip() in ("[", "{"):
            raise DataError("not JSON: the object must stand on one line, without a list around all of them") from error
        raise DataError(f"not JSON: {error.msg}, at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"lists or objects are nested more than {_DEEPEST} deep") from error
    if not isinstance(row, dict):
        raise DataError(f"a line holds an object with a prompt and an answer, not a {type(row).__name__}")
    if "\\u" in line or line.count("[") + line.count("{") > _DEEPEST:  # nothing else can be wrong, and most lines pass
        _check_values(row)
    return row


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise DataError(f"the key {key!r} stands twice; only the last would count")
        row[key] = value
    return row


def _integer(word: str) -> int:
    if len(word) > _MOST_DIGITS:
        raise DataError(f"an integer of {len(word):,} digits cannot be kept; write it in quotes")
    return int(word)


def _real(word: str) -> float:
    if math.isinf(number := float(word)):
        raise DataError(f"the number {word[:40]} is more than a float64 holds; write it in quotes")
    return number


def _no_constant(word: str) -> Any:
    raise DataError(f"{word} is no JSON; write null, or the word in quotes")


def _check_values(row: dict[str, Any]) -> None:
    """Raise DataError for what is nested too deep, and for halves of UTF-16 pairs in any text, names of keys too."""
    left: list[tuple[Any, int, str]] = [(row, 0, "")]
    while left:
        value, depth, key = left.pop()
        if depth > _DEEPEST:
            raise DataError(f"lists or objects are nested more than {_DEEPEST} deep in {key!r}")
        if isinstance(value, str) and has_surrogate(value):
            raise DataError(f"half of a UTF-16 pair stands alone in {key!r}; write the whole character")
        if isinstance(value, dict):
            left += [(name, depth, key or name) for name in value]
            left += [(inner, depth + 1, key or name) for name, inner in value.items()]
        elif isinstance(value, list):
            left += [(inner, depth + 1, key) for inner in value]


_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_integer, parse_float=_real, parse_constant=_no_constant
)
