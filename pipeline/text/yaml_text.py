"""YAML as people write it: a text becomes plain values, and every mistake names its line.

PyYAML reads YAML 1.1, where `1e-3` and `2e4` are texts, `no` is false, `010` is eight, `12:30` is 750 and
`2026-11-25` a date. Here bare words mean what they do in YAML 1.2's core schema:

null    nothing at all, ~, null
bool    true, false
int     12, -3, 1_000 (digits in groups), 0x1f, 0o17
float   1.5, .5, 1e-3, +2E4, .inf, .nan
text    everything else: yes, no, on, off, dates and times too (a field of type bool still takes yes and no)

A key that stands twice in a mapping is refused: PyYAML keeps the last one in silence. A key that is no text is refused.
Anchors, aliases and merge keys (`<<`) work; what contains itself is refused. So is what no person writes, before it
takes time or memory: a text of more than MOST_CHARACTERS, or more than MOST_VALUES values with each alias written out,
or sections more than DEEPEST deep.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.text.characters import has_surrogate

MOST_CHARACTERS = 100_000
MOST_VALUES = 50_000
DEEPEST = 100
_TAG = "tag:yaml.org,2002:"
_DIGITS = "[0-9](?:_?[0-9])*"
_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"[-+]?{_DIGITS}|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_HINTS = {
    "found character '\\t' that cannot start any token": "a tab cannot indent YAML; write blanks",
    "expected a single document in the stream": "a second document begins here; a file holds one",
}


class YamlError(ValueError):
    """A text is not YAML, or not what people mean by it. line: where, counted from 1; None for the text as a whole."""

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(problem)
        self.line = line


def parse(text: str) -> Any:
    """The one document of a text as plain values; None for a text without one. Raises YamlError."""
    if len(text) > MOST_CHARACTERS:
        raise YamlError(
            f"it has {len(text):,} characters, and settings have {MOST_CHARACTERS:,} at most; data belongs in files of "
            "its own"
        )
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"the character {chr(int(error.character))!r} may not stand in YAML", line) from error
    except yaml.MarkedYAMLError as error:
        raise _explained(error) from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(tree: dict[str, Any]) -> str:
    """Plain values as YAML that `parse` reads back as they are, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's own, with the words above."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}
    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            line = self.peek_event().start_mark.line + 1
            raise YamlError(f"brackets or sections are nested more than {DEEPEST} deep", line)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_number(self, node: Node) -> int | float:
        assert isinstance(node, ScalarNode)
        word = node.value.replace("_", "").lower()
        line = node.start_mark.line + 1
        whole = node.tag == f"{_TAG}int"
        try:
            if whole:
                return int(word, 0) if word.startswith(("0x", "0o")) else int(word)
            number = float(word.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:  # by a tag of its own; or Python's bound of 4,300 digits
            kind = "integer of at most 4,300 digits" if whole else "number"
            raise YamlError(f"{word[:20]!r} ({len(word):,} characters) is no {kind}", line) from error
        if math.isinf(number) and "inf" not in word:
            raise YamlError(f"{node.value} is more than a float64 holds", line)
        return number


class _Dumper(yaml.SafeDumper):
    """PyYAML's own, which quotes the texts that would be read as something else."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}


for _kind, (_pattern, _first) in _WORDS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(_TAG + _kind, _Loader.construct_number)


def _explained(error: yaml.MarkedYAMLError) -> YamlError:
    mark = error.problem_mark or error.context_mark
    problem = f"{error.context}, {error.problem}" if error.context and error.problem else str(error.problem)
    hint = next((words for beginning, words in _HINTS.items() if beginning in problem), problem)
    return YamlError(hint, None if mark is None else mark.line + 1)


def _check_nodes(root: Node) -> None:
    """Raise YamlError for a key that stands twice or is no text, for a node that contains itself, and for aliases that
    stand for more values than MOST_VALUES."""
    above: set[int] = set()
    values: dict[int, int] = {}  # of a node with all that is in it

    def check(node: Node) -> int:
        line = node.start_mark.line + 1
        if isinstance(node, ScalarNode):
            if has_surrogate(node.value):
                raise YamlError("half of a UTF-16 pair stands alone; write the whole character", line)
            return 1
        if id(node) in values:
            return values[id(node)]
        if id(node) in above:
            raise YamlError("this section contains itself, by an alias", line)
        above.add(id(node))
        if isinstance(node, MappingNode):
            _check_keys(node)
        children = [value for _, value in node.value] if isinstance(node, MappingNode) else node.value
        assert isinstance(node, MappingNode | SequenceNode)
        values[id(node)] = 1 + sum(check(child) for child in children)
        if values[id(node)] > MOST_VALUES:
            raise YamlError(
                f"this section holds more than {MOST_VALUES:,} values, with its aliases (*name) written out; write "
                "fewer aliases of aliases",
                line,
            )
        above.discard(id(node))
        return values[id(node)]

    check(root)


def _check_keys(node: MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            shown = f"{key.value!r} " if isinstance(key, ScalarNode) else ""
            raise YamlError(f"the key {shown}is no text; write it in quotes", line)
        if key.value in lines:
            first = lines[key.value]
            where = f"lines {first} and {line}" if first != line else f"line {line}"
            raise YamlError(f"the key {key.value!r} stands twice, in {where}; only the last would count", line)
        lines[key.value] = line
