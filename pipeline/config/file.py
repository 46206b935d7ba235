"""A YAML file and those it inherits from become one tree of settings.

base: ../parts/h100.yaml               # a path relative to this file, or
base: [../parts/h100.yaml, layout.yaml]    # several: a later one wins over an earlier one

Mappings are merged key by key, everything else is replaced; a file wins over its bases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.text.characters import decode
from pipeline.text.yaml_text import YamlError, parse


class ConfigError(SamerouteError, ValueError):
    """The configuration cannot be run; the message says what to write instead."""

    exit_code = NOT_STARTED


def read_tree(path: Path, inheriting: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The merged tree of a file, without `base`, and the files it is made of: itself first, then its nearest bases.

    inheriting: the files on the way here. Raises ConfigError: a file is missing, is not YAML (with the line), holds no
    mapping, or inherits from itself.
    """
    if "\0" in str(path):
        raise ConfigError(f"there is no config file {str(path)!r}: no name holds a NUL")
    path = path.resolve() if inheriting else path
    if path.resolve() in inheriting:
        circle = " -> ".join(str(file) for file in (*inheriting, path.resolve()))
        raise ConfigError(f"a config file inherits from itself: {circle}; remove one `base`")
    tree = _parsed(path, f", the base of {inheriting[-1]}" if inheriting else "")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base is the path of a file, or a list of paths, not {bases!r}")
    merged: dict[str, Any] = {}
    files: list[Path] = []
    for base in bases:
        below, inherited = read_tree(path.parent / base, (*inheriting, path.resolve()))
        merged, files = merge(merged, below), inherited + files
    return merge(merged, tree), [path, *files]


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
