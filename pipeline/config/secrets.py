"""What of a configuration may be a secret, and the configuration without it.

Hidden are: fields that say so themselves (`secret` below), passwords and queries in addresses, the values of arguments
and keys that are named as keys, tokens and passwords are. Everything that a run writes shows `***` in their place, but
for secrets.yaml in the run directory, which only its owner can read.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel

from pipeline.text.yaml_text import YamlError, parse

HIDDEN = "***"

_NAMED = re.compile(
    # At the end of a name: --max-total-tokens and moe_token_dispatcher_type are none.
    r"(?:^|[-_.])(?:(?:api|access|admin|private|secret|auth)[-_]?keys?|token|secrets?|passw(?:or)?d|passphrase"
    r"|credentials?|authorization)$",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"(://)[^/?#\s@]+@")
_QUERY = re.compile(r"(://[^?\s]*\?)[^\s#]+")


def shown(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a configuration, or of a part of it from the top, without what may be a secret."""
    return _split(tree, ())[0]


def hidden(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What `shown` hides, whole: merged over that, it gives the tree back. Empty where there is no secret."""
    return _split(tree, ())[1]


def hide_in_command(words: Sequence[str]) -> list[str]:
    """A command line without the secrets among its `section.field=value` overrides and addresses."""
    return [_hide_override(word) for word in words]


def hide_in_text(text: str) -> str:
    """A text without the passwords and queries of the addresses in it."""
    return _QUERY.sub(rf"\1{HIDDEN}", _PASSWORD.sub(rf"\1{HIDDEN}@", text))


def is_hidden(value: str) -> bool:
    """Whether a value is what `shown` leaves of a secret, and so no value at all."""
    return value == HIDDEN or ("://" in value and HIDDEN in value)


def _hide_override(word: str) -> str:
    key, equals, value = word.partition("=")
    try:
        node: Any = parse(value) if equals else None
    except YamlError:
        node = None  # refused as an override; as a word it may still hold an address
    tree = node
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return f"{key}={HIDDEN}" if node is not None and hidden(tree) else hide_in_text(word)


def _split(node: Mapping[str, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapping without secrets, and the keys that had some with their whole values."""
    out: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    for key, value in node.items():
        place = (*path, str(key))
        if isinstance(value, Mapping) and place not in _secret_fields():
            out[key], below = _split(value, place)
            if below:
                secrets[key] = below
            continue
        out[key] = _without(value, secret=place in _secret_fields() or _NAMED.search(str(key)) is not None)
        if out[key] != value:
            secrets[key] = value
    return out, secrets


def _without(value: Any, *, secret: bool) -> Any:
    """A value without its secrets, and of the same shape: it must still be valid where a checkpoint keeps it."""
    if isinstance(value, str):
        scheme = re.match(r"[a-z]+://", value)
        return f"{scheme.group() if scheme else ''}{HIDDEN}" if secret else hide_in_text(value)
    if isinstance(value, Mapping):
        return {
            key: _without(inner, secret=secret or _NAMED.search(str(key)) is not None) for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return _without_arguments(value, secret=secret)
    return value


def _without_arguments(values: Sequence[Any], *, secret: bool) -> list[Any]:
    """A list, or a command line: of a secret one the program's name stays; else `--api-key=x` and `--api-key x` lose
    their x."""
    if secret:
        return [*values[:1], *(_without(value, secret=True) for value in values[1:])]
    out, follows = [], False
    for value in values:
        name, equals, _ = value.partition("=") if isinstance(value, str) else ("", "", "")
        named = name.startswith("-") and _NAMED.search(name) is not None
        out.append(f"{name}={HIDDEN}" if named and equals else _without(value, secret=follows))
        follows = named and not equals
    return out


@cache
def _secret_fields() -> frozenset[tuple[str, ...]]:
    """The fields with `json_schema_extra={"secret": True}`."""
    from pipeline.config.tree import Config  # which is above this file

    return frozenset(_marked(Config, ()))


def _marked(model: type[BaseModel], path: tuple[str, ...]) -> list[tuple[str, ...]]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("secret"):
            found.append((*path, name))
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += _marked(inner, (*path, name))
    return found
