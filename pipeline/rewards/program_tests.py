"""Tests of programs as data sets write them, in the metadata of a prompt; a text is JSON of one of these:

{"inputs": ["3\\n", ...], "outputs": ["9\\n", ...]}                  standard input, standard output
[{"input": "3\\n", "output": "9\\n"}, ...]                           the same
{"fn_name": "square", "inputs": [[3], ...], "outputs": [9, ...]}    arguments, what is returned
[{"fn_name": "square", "input": [3], "output": 9}, ...]             the same
["assert square(3) == 9", "assert is_even(2)", ...]                 the same; what is right is a literal
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NEAR = 1e-6
"""Relative and absolute difference of decimals that are the same."""


@dataclass(frozen=True)
class Streams:
    """What a program reads, and what it should print."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Call:
    """A function of the program by its name with arguments, or an expression; and the value that it should have.

    truth: whether only that counts: a value of True is then anything that is true.
    """

    value: Any
    truth: bool = False
    name: str = ""
    arguments: Sequence[Any] = ()
    expression: str = ""


@dataclass(frozen=True)
class Calls:
    """Calls of one program."""

    calls: tuple[Call, ...]


Tests = tuple[Streams, ...] | Calls


def read_tests(value: Any) -> Tests:
    """At least one test. Raises ValueError for what has none of the forms above, showing it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"the tests are no JSON: {value[:200]!r}") from error
    if isinstance(value, dict):
        name, inputs, outputs = value.get("fn_name"), value.get("inputs"), value.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError(f"tests need as many inputs as outputs: {str(value)[:200]}")
        value = [{"fn_name": name, "input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"tests are a list of at least one: {str(value)[:200]}")
    if all(isinstance(test, str) for test in value):
        return Calls(tuple(map(_asserted, value)))
    if not all(isinstance(test, dict) and "input" in test and "output" in test for test in value):
        raise ValueError(f'a test has the keys "input" and "output": {str(value)[:200]}')
    if all(test.get("fn_name") for test in value):
        return Calls(tuple(map(_called, value)))
    return tuple(Streams(_lines(test["input"]), _lines(test["output"])) for test in value)


def same_output(printed: str, right: str) -> bool:
    """Equal but for white space at the ends of lines and of the whole; or word for word, decimals by their values."""
    ours, theirs = ([line.rstrip() for line in text.strip().splitlines()] for text in (printed, right))
    if ours == theirs:
        return True
    words, others = printed.split(), right.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def same_value(value: Any, call: Call) -> bool:
    """Equal as `plain` values, decimals nearly; data sets also write what is right in a list of its own."""
    if value is NotImplemented:
        return False
    if call.truth:
        return bool(value) is call.value
    right, expected = call.value, plain(call.value)
    if _equal(value, expected):
        return True
    return isinstance(right, list) and len(right) == 1 and _equal(value, expected[0])


def plain(value: Any) -> Any:
    """As JSON would give it back: tuples are lists, sets are sorted lists, keys are texts."""
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(inner) for inner in value), key=repr)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, float) or isinstance(other, float):
        return _near(one, other)
    return type(one) is type(other) and one == other


def _near(one: Any, other: Any) -> bool:
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in (one, other)):
        return False
    try:
        return one == other or math.isclose(one, other, rel_tol=_NEAR, abs_tol=_NEAR)
    except OverflowError:  # an integer beyond float64
        return False


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    if not any(mark in one + other for mark in ".eE"):
        return False
    try:
        return math.isclose(float(one), float(other), rel_tol=_NEAR, abs_tol=_NEAR)
    except ValueError:
        return False


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _called(test: dict[str, Any]) -> Call:
    """Arguments are a list, or a text with the JSON of one on each line; the value is JSON, or a text of it."""
    arguments, value = test["input"], test["output"]
    try:
        if isinstance(arguments, str):
            arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
            value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"the arguments of a call are a list, or JSON a line: {str(test)[:200]}") from error
    if not isinstance(arguments, list):
        raise ValueError(f"the arguments of a call are a list: {str(test)[:200]}")
    return Call(value, name=str(test["fn_name"]), arguments=arguments)


def _asserted(text: str) -> Call:
    """Of `assert call == value`, `assert call` or `assert not call`."""
    wrong = f"a test that is a text reads `assert call == value` with a literal: {text[:200]!r}"
    try:
        (statement,) = ast.parse(text.strip()).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(wrong) from error
    if not isinstance(statement, ast.Assert):
        raise ValueError(wrong)
    test = statement.test
    if isinstance(test, ast.Compare):
        if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq | ast.Is):
            raise ValueError(wrong)
        try:
            return Call(ast.literal_eval(test.comparators[0]), expression=ast.unparse(test.left))
        except ValueError as error:
            raise ValueError(wrong) from error
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Call(False, truth=True, expression=ast.unparse(test.operand))
    return Call(True, truth=True, expression=ast.unparse(test))
