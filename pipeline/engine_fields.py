"""Names and types of what is passed on to the engines, read from their sources: importing them takes seconds.

trainer.extra        fields of Megatron-Core's (0.19.2) TransformerConfig: classes with annotated attributes
server.extra_args    SGLang's (0.5.23) command line: annotated attributes, and options named in full

Where an engine is not installed, as on a laptop that plans, nothing is known and nothing is refused.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MEGATRON = ("core/model_parallel_config.py", "core/transformer/transformer_config.py")
_SGLANG = ("srt/server_args.py", "srt/arg_groups/fields/*.py")
_LATENT = "MLATransformerConfig"  # its fields are those of models with latent attention
_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": (type(None),)}
_COLLECTIONS = ("list", "List", "tuple", "Tuple", "Sequence")
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list"}


def check_megatron_fields(fields: Mapping[str, Any], *, latent: bool) -> None:
    """Raise ValueError for a field that TransformerConfig does not have, or whose value is of another type.

    latent: whether the model has multi-head latent attention, whose class has further fields.
    """
    known = _megatron() if fields else {}
    for name, value in fields.items() if known else ():
        there = known[_LATENT] | known[""] if latent else known[""]
        if name not in there:
            why = "it is for models with latent attention" if name in known[_LATENT] else _nearest(name, there)
            raise ValueError(f"trainer.extra: Megatron-Core's TransformerConfig has no field {name}; {why}")
        if wrong := _wrong(value, there[name]):
            raise ValueError(f"trainer.extra: {name} is {wrong}, not {value!r}")


def check_sglang_arguments(arguments: Sequence[str]) -> None:
    """Raise ValueError for an argument that SGLang's command line does not have, or that is not written as a list."""
    known = _sglang() if arguments else {}
    if not known:
        return
    if not arguments[0].startswith("--"):
        raise ValueError(
            f"server.extra_args: {arguments[0]!r} belongs to no argument; write [--name, value], or [--name]"
        )
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        if not argument.startswith("--"):
            continue
        name, equals, given = argument.partition("=")
        if " " in name:
            items = ", ".join(argument.split(None, 1))
            raise ValueError(f"server.extra_args: write {argument!r} as two items: [{items}]")
        whole = name if name in known else next((f for f in known if len(name) > 3 and f.startswith(name)), None)
        if whole is None:
            raise ValueError(f"server.extra_args: SGLang has no argument {name}; {_nearest(name, known)}")
        value = given if equals else after
        number = _number(known[whole])
        if number is None:
            continue
        try:
            number(value or "")
        except ValueError as error:
            shown = "nothing" if value is None else repr(value)
            raise ValueError(f"server.extra_args: {whole} takes {_WORDS[number]}, not {shown}") from error


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "leave it out"


@functools.cache
def _megatron() -> dict[str, dict[str, ast.expr]]:
    """Annotations by field, under the name of the class with latent attention or ""; empty without Megatron-Core."""
    found: dict[str, dict[str, ast.expr]] = {}
    for tree in _sources("megatron", _MEGATRON):
        for part in tree.body:
            if isinstance(part, ast.ClassDef):
                found.setdefault(_LATENT if part.name == _LATENT else "", {}).update(_annotated(part))
    return found if "" in found and _LATENT in found else {}


@functools.cache
def _sglang() -> dict[str, ast.expr | None]:
    """Annotations by option; None where only its name is known. Empty without SGLang."""
    found: dict[str, ast.expr | None] = {}
    for tree in _sources("sglang", _SGLANG):
        for part in ast.walk(tree):
            if isinstance(part, ast.Constant) and re.fullmatch("--[a-z0-9-]+", str(part.value)):
                found.setdefault(str(part.value))
            if isinstance(part, ast.ClassDef):
                for name, annotation in _annotated(part).items():
                    option = name.replace("_", "-")
                    found |= {f"--{option}": annotation, f"--no-{option}": None}
    return found


def _annotated(part: ast.ClassDef) -> dict[str, ast.expr]:
    return {
        a.target.id: a.annotation for a in part.body if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
    }


def _sources(package: str, patterns: Sequence[str]) -> list[ast.Module]:
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for pattern in patterns for file in sorted(folder.glob(pattern))]
    return [ast.parse(file.read_text(encoding="utf-8")) for file in files]


def _wrong(value: Any, annotation: ast.expr) -> str:
    """What a field takes instead of this value; empty where it may be right."""
    words = []
    for one in _alternatives(annotation):
        if one is None:
            return ""
        if isinstance(one, type):
            if isinstance(value, one) and (one is bool or not isinstance(value, bool)):
                return ""
            words.append("null" if one is type(None) else _WORDS[one])
        else:
            if one.value == value:
                return ""
            words.append(repr(one.value))
    if _WORDS[float] in words and _WORDS[int] in words:
        words.remove(_WORDS[int])
    return " or ".join(dict.fromkeys(words))


def _alternatives(annotation: ast.expr) -> list[type | ast.Constant | None]:
    """Types and literal values that an annotation allows; None for one that is not known here."""
    match annotation:
        case ast.Constant(value=None):
            return [type(None)]
        case ast.Constant(value=str(text)):
            return _alternatives(ast.parse(text, mode="eval").body)
        case ast.Name(id=name) if name in _TYPES:
            return list(_TYPES[name])
        case ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name)) if name in _COLLECTIONS:
            return [list]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _alternatives(left) + _alternatives(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return [*_alternatives(inner), type(None)]
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return [one for part in parts for one in _alternatives(part)]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [part if isinstance(part, ast.Constant) else None for part in parts]
    return [None]


def _number(annotation: ast.expr | None) -> type[int] | type[float] | None:
    """What an option's value is parsed as, where that is a plain number."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="A"), slice=ast.Tuple(elts=[kind, about])):
            if isinstance(about, ast.Call) and any(k.arg in ("type_parser", "action", "nargs") for k in about.keywords):
                return None
            types = [one for one in _alternatives(kind) if one is not type(None)]
            return float if types == [int, float] else int if types == [int] else None
    return None
