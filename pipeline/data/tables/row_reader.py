"""A row of a file or data set to a question: which column holds what, the template, the answer, what verifiers get."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Protocol

from pipeline.config.sources import RowsConfig
from pipeline.data.chat import Asked, DataError

_NAMED = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")
_EXACT = 2**53  # whole numbers up to here are what a float64 says


Lacks = Callable[[str, Mapping[str, Any]], str | None]
"""From the name of a source and the metadata of one of its rows to what is not there, in words; None for nothing."""


def nothing(source: str, metadata: Mapping[str, Any]) -> str | None:
    """Of rows that nobody needs anything of."""
    return None


class Table(Protocol):
    """Rows by number, which do not sit in memory. place: where they lie, for messages."""

    place: str

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        """Every row from the first, or what is wrong with it. Raises DataError where none of it can be read."""
        ...

    def record(self, row: int) -> dict[str, Any]:
        """One that was scanned before."""
        ...

    def where(self, row: int) -> str:
        """For messages: "data.jsonl, line 7"."""
        ...

    def __len__(self) -> int: ...


class RowReader:
    """Rows of one source to questions."""

    def __init__(self, config: RowsConfig, name: str, lacks: Lacks = nothing):
        """name: of the source. lacks: what verifiers would miss, which makes a row wrong. Raises DataError for an
        answer_pattern that is no pattern with a group."""
        self.config, self.name, self.lacks = config, name, lacks
        self._pattern = None if config.answer_pattern is None else _pattern(config.answer_pattern)
        columns = config.columns
        self._taken = {columns.prompt, columns.messages, columns.tools}

    def __call__(self, record: dict[str, Any], row: int, where: str) -> Asked:
        """Raises DataError, which does not say where."""
        if self.config.json_columns:
            record = record | {name: _json(record, name) for name in self.config.json_columns}
        messages = self._messages(record)
        answer = self._answer(record)
        tools = self._tools(record)
        metadata = self._kept(record) | ({} if answer is None else {"answer": answer}) | self.config.metadata
        if (why := self.lacks(self.name, metadata)) is not None:
            raise DataError(why)
        return Asked(messages, answer, metadata, tools, where, f"{self.name}:{row}")

    def _messages(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        columns = self.config.columns
        if self.config.prompt_template is not None:
            return [{"role": "user", "content": filled(self.config.prompt_template, record)}]
        prompt, messages = _at(record, columns.prompt), _at(record, columns.messages)
        if (prompt is None) == (messages is None):
            raise DataError(
                f'needs exactly one of the keys "{columns.prompt}" and "{columns.messages}"; it has '
                f"{', '.join(record) or 'no keys'}"
            )
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        said = prompt if messages is None else messages
        well_formed = isinstance(said, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in said
        )
        if not said or not well_formed:
            raise DataError(
                f'"{columns.prompt}" is a text, "{columns.messages}" a list of {{"role": text, "content": text}}; '
                "either may hold such a list"
            )
        return [{key: value for key, value in message.items() if value is not None} for message in said]

    def _answer(self, record: dict[str, Any]) -> str | None:
        column = self.config.columns.answer
        if column is None:
            return None
        answer = as_text(_at(record, column))
        if answer is None:
            raise DataError(
                f'needs the key "{column}", a text or a number; data.sources has columns.answer=null for rows without'
            )
        if self._pattern is not None:
            found = self._pattern.search(answer)
            if found is None or found[1] is None:
                raise DataError(f"answer_pattern {self.config.answer_pattern!r} finds nothing in {answer[-200:]!r}")
            return found[1].strip()
        return answer

    def _tools(self, record: dict[str, Any]) -> list[dict[str, Any]] | None:
        column = self.config.columns.tools
        tools = None if column is None else _at(record, column)
        if column is None or tools is None or tools == "":
            return None
        tools = _json(record, column) if isinstance(tools, str) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f'"{column}" is a list of JSON schemas, or its JSON as text')
        return tools

    def _kept(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.config.keep is None:
            return {key: value for key, value in record.items() if key not in self._taken}
        kept = {name: _at(record, column) for name, column in self.config.keep.items()}
        if missing := [name for name, value in kept.items() if value is None]:
            raise DataError(f'lacks "{self.config.keep[missing[0]]}", which `keep` names; it has {", ".join(record)}')
        return kept


def filled(template: str, record: Mapping[str, Any]) -> str:
    """The template with the columns that it names. Raises DataError for one that is not there or holds no text."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        found = as_text(_at(record, match[1]))
        if found is None:
            raise DataError(f'the prompt template names {match[0]}, and "{match[1]}" holds no text or number')
        return found

    return _NAMED.sub(value, template)


def columns_of(template: str) -> set[str]:
    """The columns that a prompt template names."""
    return {match[1] for match in _NAMED.finditer(template) if match[1] is not None}


def as_text(value: Any) -> str | None:
    """A text or a number as text, a whole float without its point: 42.0 is "42". None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return str(int(value))
    return str(value)


def as_json(value: Any, column: str) -> Any:
    """A value of a data set as JSON has it, so that every later process reads the same: times as ISO 8601, decimals as
    text, not-a-number as null. Raises DataError, naming the column, for bytes, infinity and what JSON does not know."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise DataError(f'"{column}" holds an infinite number; write it as text')
        return None if math.isnan(value) else value
    if isinstance(value, list | tuple):
        return [as_json(inner, column) for inner in value]
    if isinstance(value, dict):
        return {str(key): as_json(inner, column) for key, inner in value.items()}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    raise DataError(f'"{column}" holds {type(value).__name__}, which JSON does not; name the columns to `keep`')


def _at(record: Mapping[str, Any], column: str) -> Any:
    """What a column holds; a dot goes into an object where no column is called so. None where there is nothing."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _json(record: Mapping[str, Any], column: str) -> Any:
    text = _at(record, column)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f'"{column}" is no JSON: {error}') from error


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is none of its values")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text, re.DOTALL)
    except re.error as error:
        raise DataError(f"answer_pattern {text!r} is no regular expression: {error}") from error
    if pattern.groups < 1:
        raise DataError(f"answer_pattern {text!r} has no group; put brackets around the answer: '####\\s*(.+)'")
    return pattern
