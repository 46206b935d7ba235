"""A YAML file and those it inherits from become one tree of settings.

base: ../parts/h100.yaml               # a path relative to this file, or
base: [../parts/h100.yaml, layout.yaml]    # several: a later one wins over an earlier one

Mappings are merged key by key, everything else is replaced; a file wins over its bases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import NOT_STARTED, SamerouteError


class ConfigError(SamerouteError, ValueError):
    """The configuration cannot be run; the message says what to write instead."""

    exit_code = NOT_STARTED


def read_tree(path: Path, inheriting: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The merged tree of a file, without `base`, and the files it is made of: itself first, then its nearest bases.

    inheriting: the files on the way here. Raises ConfigError: a file is missing, is not YAML, holds no mapping, or
    inherits from itself.
    """
    path = path.resolve() if inheriting else path
    if path.resolve() in inheriting:
        circle = " -> ".join(str(file) for file in (*inheriting, path.resolve()))
        raise ConfigError(f"a config file inherits from itself: {circle}; remove one `base`")
    if not path.is_file():
        by = f", the base of {inheriting[-1]}" if inheriting else ""
        raise ConfigError(f"there is no config file {path}{by}")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
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


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings of both joined key by key; where one of two values is no mapping, `over` has it."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out
