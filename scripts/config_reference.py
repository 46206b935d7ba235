"""docs/config.md from the configuration's own classes: every field, its type, its default, what it means.

.venv/bin/python scripts/config_reference.py            # writes the page
.venv/bin/python scripts/config_reference.py --check    # ends with 1 where the page is another
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Config

PAGE = Path("docs/config.md")
_WRITTEN_LIKE = {"evaluate.sources": "data.sources", "evaluate.chat": "data.chat", "evaluate.rewards": "rewards"}
"""Sections of the same classes as one further up."""
HEAD = """# Configuration

A run is one YAML file. Any field can be set on the command line as `section.field=value`, where the value is YAML. A
file may inherit: `base: other.yaml`, or a list of files of which a later one wins; paths are relative to the file that
names them, mappings are merged key by key, the file wins over its bases and the command line over the file. What is not
named has its default. What cannot run is refused before anything starts.

Numbers are written as people write them, in files and on the command line: `1e-3`, `2E4`, `.5`, `1_000`. `true` and
`false` are truth values; `yes`, `no`, `on`, `off`, dates and times are text, and a field of type true or false takes
the first four as well. A key that stands twice is refused.

This page is made by `.venv/bin/python scripts/config_reference.py` from the classes themselves.
"""


def page() -> str:
    """The whole page."""
    top, sections = [], []
    for name, field in Config.model_fields.items():
        if not _models_of(field.annotation):
            top.append(_row(name, field))
        sections += _sections(name, field)
    return "\n".join([HEAD, "## At the top", "", *_table(top), *_once(sections)]) + "\n"


def _sections(path: str, field: FieldInfo) -> list[list[str]]:
    """Of each class that a field may hold: a heading, its own words, its fields; then the sections inside it."""
    out, models = [], _models_of(field.annotation)
    if (as_elsewhere := _WRITTEN_LIKE.get(path)) is not None:
        return [["", f"## `{path}`", "", f"Written like `{as_elsewhere}`."]]
    for model in models:
        kind = f" of kind `{model.model_fields['kind'].default}`" if len(models) > 1 else ""
        words = (model.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
        heading = f"## `{path}`{kind}" + (" (required)" if field.is_required() else "")
        out.append(["", heading, "", words, "", *_table([_row(n, f) for n, f in model.model_fields.items()])])
        for name, inner in model.model_fields.items():
            out += _sections(f"{path}.{name}", inner)
    return out


def _once(sections: list[list[str]]) -> list[str]:
    """Their lines; kinds that share a section show it once."""
    return [line for section in dict.fromkeys(map(tuple, sections)) for line in section]


def _table(rows: list[str]) -> list[str]:
    return ["| field | type | default | |", "|---|---|---|---|", *rows]


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field), _default(field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        assert field.default_factory is not None
        value = field.default_factory()  # pyright: ignore[reportCallIssue]
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, dict | list | tuple):
        return f"`{value!r}`" if value else "none"
    return f"`{json.dumps(value) if value in (None, '') or isinstance(value, bool) else value}`"


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The section that a field holds, or a list of it, if it holds one; several where it may be one of several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models_of(inner)]


def _type(field: FieldInfo) -> str:
    """`int, 1 or more`, `bf16 or fp32`, `list of text`."""
    limits = []
    for limit in field.metadata:
        for attribute, words in (
            ("ge", "{} or more"),
            ("gt", "more than {}"),
            ("le", "{} at most"),
            ("lt", "less than {}"),
        ):
            if (bound := getattr(limit, attribute, None)) is not None:
                limits.append(words.format(bound))
    return ", ".join([_words(field.annotation), *limits])


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if one is type(None) else _words(one) for one in arguments))
    if origin in (list, tuple):
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin is typing.Annotated:
        return _words(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    made = page()
    if parser.parse_args().check:
        if PAGE.read_text() == made:
            return 0
        print(f"{PAGE} is not what the classes say; run scripts/config_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(made)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
