"""A file of JSON lines as prompts. All of it is read and tokenized before anything starts: a bad line is named then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.chat import DataError, chat_text, check_known, check_vocabulary, token_ids
from pipeline.text.characters import decode, has_surrogate
from pipeline.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 512  # texts tokenized at once
_PROGRESS_S = 5.0
_DEEPEST = 64  # lists and objects inside one another; what writes rollouts recurses too
_MOST_DIGITS = 4300  # of an integer that Python reads and writes


@dataclass(frozen=True)
class Row:
    """A line of the file, by its number from 1. metadata: all keys but prompt and messages."""

    line: int
    messages: list[dict[str, str]]
    metadata: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Every line; blank ones are passed over.

    Raises DataError: no such file, no lines, another kind of file, or, by its number, a line that is not UTF-8 or not
    JSON, lacks a key, holds one twice, or holds what could not be written again.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no data file {path}") from error
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read: {error.strerror}") from error
    try:
        text = decode(raw)
    except ValueError as error:
        raise DataError(f"{path}, {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_row(number, line))
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no prompts")
    return rows


def tokenize(
    path: Path,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    vocab_size: int,
    say: Callable[[str], None],
) -> list[Prompt]:
    """A prompt for each row.

    limit: longest prompt, tokens. vocab_size: of the model. say: gets a line every few seconds.
    Raises DataError, naming the line.
    """
    prompts: list[Prompt] = []
    said = time.monotonic()
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        texts = [_at(path, row, lambda row=row: chat_text(tokenizer, row.messages)) for row in batch]
        for row, text, ids in zip(batch, texts, token_ids(tokenizer, texts), strict=True):
            _at(path, row, lambda ids=ids, text=text: check_known(tokenizer, ids, text))
            check_vocabulary(tokenizer, ids, vocab_size, f"{path}, line {row.line}")
            prompt = Prompt(ids, text, row.metadata)
            check_length(prompt, limit, f"{path}, line {row.line}")
            prompts.append(prompt)
        if time.monotonic() - said > _PROGRESS_S:
            said = time.monotonic()
            say(f"{path}: {len(prompts):,} of {len(rows):,} prompts are tokenized")
    return prompts


def check_length(prompt: Prompt, limit: int, name: str) -> None:
    """Raise DataError where a prompt has more than `limit` tokens."""
    if len(prompt.ids) > limit:
        raise DataError(
            f"{name} has {len(prompt.ids)} tokens, the limit is {limit}; raise data.max_prompt_tokens or remove it"
        )


def _at[T](path: Path, row: Row, act: Callable[[], T]) -> T:
    try:
        return act()
    except DataError as error:
        raise DataError(f"{path}, line {row.line}: {error}") from error


def _row(number: int, line: str) -> Row:
    row = _object(line)
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f'needs exactly one of the keys "prompt" and "messages"; it has {", ".join(row) or "no keys"}')
    if not isinstance(row.get("answer"), str):
        raise DataError('needs the key "answer", a text; write a number in quotes')
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not messages or not well_formed:
        raise DataError('"prompt" is a text, "messages" a list of {"role": text, "content": text}')
    return Row(number, messages, {key: value for key, value in row.items() if key not in ("prompt", "messages")})


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(
            line, object_pairs_hook=_pairs, parse_int=_integer, parse_float=_real, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        if line.strip() in ("[", "{"):
            raise DataError("not JSON: the object must stand on one line, without a list around all of them") from error
        raise DataError(f"not JSON: {error.msg}, at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"lists or objects are nested more than {_DEEPEST} deep") from error
    if not isinstance(row, dict):
        raise DataError(f"a line holds an object with a prompt and an answer, not a {type(row).__name__}")
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
