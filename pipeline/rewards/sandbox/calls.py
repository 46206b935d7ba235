"""A program whose functions are called, as one whose output says what they returned.

The program is loaded as a module, not as __main__. What it prints goes to standard error; standard output has a line of
JSON a call: {"value": ...}, or {"raised": ...}. It knows its arguments only, so that a line of its own invention is a
guess as any other answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_CALLER = """
import json, os, sys

def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(inner) for inner in value), key=repr)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError("a " + type(value).__name__ + " is no value of JSON")

def called(call, names):
    if call["expression"]:
        return eval(call["expression"], names)
    function = names.get(call["name"])
    if function is None and "Solution" in names:
        function = getattr(names["Solution"](), call["name"])
    return function(*call["arguments"])

told = json.loads(TOLD)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "solution"}
exec(compile(told["source"], "solution.py", "exec"), names)
for call in told["calls"]:
    try:
        line = json.dumps({"value": plain(called(call, names))})
    except BaseException as error:
        line = json.dumps({"raised": type(error).__name__})
    answers.write(line + "\\n")
    answers.flush()
"""


def calling(source: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The program that makes the calls. Each: {"name", "arguments"}, or {"expression"} of names of the program."""
    return f"TOLD = {json.dumps({'source': source, 'calls': list(calls)})!r}\n{_CALLER}"


def values_of(stdout: str) -> list[Any]:
    """What each call returned, in order, as far as it came; NotImplemented, which equals nothing, where it raised."""
    values = []
    for line in stdout.splitlines():
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            break
        values.append(said.get("value", NotImplemented) if isinstance(said, dict) else NotImplemented)
    return values
