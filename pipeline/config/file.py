"""A YAML file and those it inherits from become one tree of settings.

base: ../parts/h100.yaml               # a path relative to this file, or
base: [../parts/h100.yaml, layout.yaml]    # several: a later one wins over an earlier one

Mappings are merged key by key, everything else is replaced; a file wins over its bases.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.text.characters import decode
from pipeline.text.yaml_text import YamlError, parse

MOST_FILES = 100


class ConfigError(SamerouteError, ValueError):
    """The configuration cannot be run; the message says what to write instead."""

    exit_code = NOT_STARTED


def read_tree(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The merged tree of a file, without `base`, and the files it is made of: itself first, then its nearest bases.

    Raises ConfigError: a file is missing, is not YAML (with the line), holds no mapping, or inherits from itself; or
    there are more than MOST_FILES, each counted as often as it is named.
    """
    return _with_bases(path, (), itertools.count(1))


def _with_bases(path: Path, inheriting: tuple[Path, ...], read: Iterator[int]) -> tuple[dict[str, Any], list[Path]]:
    """The same. inheriting: the files on the way here. read: counts all files."""
    if "\0" in str(path):
        raise ConfigError(f"there is no config file {str(path)!r}: no name holds a NUL")
    path = path.resolve() if inheriting else path
    if path.resolve() in inheriting:
        circle = " -> ".join(str(file) for file in (*inheriting, path.resolve()))
        raise ConfigError(f"a config file inherits from itself: {circle}; remove one `base`")
    if next(read) > MOST_FILES:
        raise ConfigError(
            f"{inheriting[0]} inherits from more than {MOST_FILES} files, each counted as often as a `base` names it; "
            "name fewer"
        )
    tree = _parsed(path, f", the base of {inheriting[-1]}" if inheriting else "")
    merged: dict[str, Any] = {}
    files: list[Path] = []
    for base in _bases(path, tree):
        below, inherited = _with_bases(path.parent / base, (*inheriting, path.resolve()), read)
        merged, files = merge(merged, below), inherited + files
    return merge(merged, tree), [path, *files]


def _bases(path: Path, tree: dict[str, Any]) -> list[str]:
    """What a file names as its bases; taken out of its tree."""
    if "base" not in tree:
        return []
    given = tree.pop("base")
    bases = given if isinstance(given, list) else [given]
    if not bases or not all(isinstance(base, str) and base.strip() for base in bases):
        raise ConfigError(
            f"{path}: base is the path of a file, or a list of paths, not {reprlib.repr(given)}; leave it out where "
            "there is none"
        )
    return bases


def _parsed(path: Path, by: str) -> dict[str, Any]:
    """The mapping that one file holds. by: who asks for it, behind its name."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"there is no config file {path}{by}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}{by} is a directory; name a YAML file in it") from error
    except OSError as error:
        raise ConfigError(f"the config file {path}{by} cannot be read: {error.strerror}") from error
    try:
        tree = parse(decode(raw))
    except YamlError as error:
        where = f"{path}, line {error.line}" if error.line else str(path)
        raise ConfigError(f"{where}, is not YAML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}, {error}") from error
    if tree is None:
        raise ConfigError(f"{path}{by} holds no settings: it is empty, or all of it is comments")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    return tree


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings of both joined key by key; where one of two values is no mapping, `over` has it."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out
